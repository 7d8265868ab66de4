"""Fingerprints: a repeated sweep skips runs with an ok record of the same settings, code and machine."""

import hashlib
import json
from pathlib import Path
from typing import Any

from zi_experiments.config.folders import telling
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
    """Return 16 hexadecimal digits that identify a result: its resolved settings, code, machine, weights and texts."""
    assert record.environment is not None
    identity = {
        "config": telling(record.config),
        "machine": {key: record.environment[key] for key in MACHINE},
        "checkpoint": record.checkpoint,
        "text": _digest(record.config["workload"].get("text")),
        "prompts": _digest(record.config["workload"].get("prompts")),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _digest(path: str | None) -> str | None:
    """Return the SHA-256 of a file that the workload names, or None."""
    try:
        return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest() if path else None
    except OSError:
        return None  # the run will be refused


def finished(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the record in a `result.json` if it is ok and has that fingerprint, else None."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        known = result["status"] == "ok" and result["run"]["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if known else None
