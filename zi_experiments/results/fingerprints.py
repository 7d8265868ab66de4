"""A sweep that is run again runs only what has not been finished: the same settings, code and machine, and an ok record."""

import hashlib
import json
from pathlib import Path
from typing import Any

from zi_experiments.config.folders import ASIDE
from zi_experiments.results.record import Record

MACHINE = (
    "code",
    "packages",
    "python",
    "cpu",
    "cpu_cores",
    "device",
    "gpu",
    "gpu_memory_bytes",
    "gpus_visible",
    "driver",
)


def fingerprint(record: Record) -> str:
    """What identifies a result, as 16 hexadecimal digits: resolved settings, code, machine, weights and text."""
    assert record.environment is not None
    identity = {
        "config": {key: value for key, value in record.config.items() if key not in ASIDE},
        "machine": {key: record.environment[key] for key in MACHINE},
        "checkpoint": record.checkpoint,
        "text": _digest(record.config["workload"].get("text")),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _digest(path: str | None) -> str | None:
    """What is in the file of `workload.text`."""
    try:
        return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest() if path else None
    except OSError:
        return None  # the run will be refused


def finished(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The record in a `result.json` when it is ok and has that fingerprint."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        known = result["status"] == "ok" and result["run"]["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if known else None
