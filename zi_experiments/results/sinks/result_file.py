"""`result.json` in the run's output folder."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

from zi_experiments.config import folders
from zi_experiments.results.record import Record

NAME = "result.json"
PLAN_NAME = "plan.json"  # the record of a plan alone


class ResultFile:
    def open(self, record: Record) -> None:
        self.write(record)

    def write(self, record: Record) -> None:
        """Write the record atomically, through a temporary file. The record of another run is kept beside it."""
        _put(_temporary(record), record.run.id)

    def write_unless_finished(self, record: Record) -> bool:
        """Write it unless, when it is ready, this run has a finished record. Return whether it was written."""
        temporary = _temporary(record)
        if has_finished := _has_finished(temporary.with_name(NAME), record.run.id):
            temporary.unlink()
        else:
            _put(temporary, record.run.id)
        return not has_finished

    def withdraw(self, record: Record) -> None:
        """Remove the written record: there is nothing to run."""
        (Path(record.folder) / NAME).unlink(missing_ok=True)

    def close(self) -> None:
        pass


def _temporary(record: Record) -> Path:
    """Return a file of its own, in the folder of the record, that has its text: several launchers may write at a time."""
    path = Path(record.folder) / f".{NAME}.{secrets.token_hex(4)}.tmp"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = to_json(record)
    try:
        with path.open("w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path


def _put(temporary: Path, run_id: str) -> None:
    path = temporary.with_name(NAME)
    if _run(path).get("id", run_id) != run_id:  # an earlier sweep has left it here
        path.rename(path.with_name(f"result-{folders.slug(str(_run(path)['id']))}.json"))
    temporary.replace(path)


def _has_finished(path: Path, run_id: str) -> bool:
    run = _run(path)
    return run.get("id") == run_id and run.get("finished_at") is not None


def _run(path: Path) -> dict[str, Any]:
    """Return what a record says of its run; nothing if there is no record."""
    try:
        return dict(json.loads(path.read_text())["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def to_json(record: Record) -> str:
    """Return the text of `result.json`."""
    return json.dumps(record.to_dict(), indent=2, allow_nan=False)
