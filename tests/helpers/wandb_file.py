"""Reads what Weights & Biases wrote offline: a LevelDB-style log of protobuf records."""

import json
import struct
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

HEADER, BLOCK, FULL, LAST = 7, 32768, 1, 4


def records(path: Path) -> list[Any]:
    data, at, parts, out = path.read_bytes(), HEADER, b"", []
    while at + HEADER <= len(data):
        room = BLOCK - at % BLOCK
        if room < HEADER:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        if kind == 0:
            at += room
            continue
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            record = pb.Record()
            record.ParseFromString(parts)
            out.append(record)
            parts = b""
    return out


def read(folder: Path, kind: str = "offline-run") -> dict[str, Any]:
    """Name, group, configuration, history rows, final summary, metric definitions and artifacts of one run."""
    (path,) = folder.glob(f"wandb/{kind}-*/run-*.wandb")
    run: dict[str, Any] = {"history": [], "summary": {}, "metrics": {}, "artifacts": [], "config": {}}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run |= {"name": record.run.display_name, "group": record.run.run_group, "job_type": record.run.job_type}
            run |= {"id": record.run.run_id, "project": record.run.project, "tags": list(record.run.tags)}
            run["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            run["config"] |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            run["history"].append({_key(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            run["summary"] |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "metric":
            run["metrics"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            manifest = record.request.log_artifact.artifact.manifest
            run["artifacts"].append(sorted(entry.path for entry in manifest.contents))
        elif kind == "artifact":
            run["artifacts"].append(sorted(entry.path for entry in record.artifact.manifest.contents))
        elif kind == "exit":
            run["exit_code"] = record.exit.exit_code
    return run


def _key(item: Any) -> str:
    return item.key or ".".join(item.nested_key)
