"""`result.json` in the run's output folder."""

import json
import os
from pathlib import Path

from zi_experiments.config import folders
from zi_experiments.results.record import Record

NAME = "result.json"
PLAN_NAME = "plan.json"  # the record of a plan alone


class ResultFile:
    def open(self, record: Record) -> None:
        self.write(record)

    def write(self, record: Record) -> None:
        """Write the record atomically, through a temporary file. The record of another run is kept beside it."""
        folder = Path(record.folder)
        folder.mkdir(parents=True, exist_ok=True)
        temporary, text = folder / f".{NAME}.tmp", to_json(record)
        try:
            with temporary.open("w") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        _set_aside(folder / NAME, record.run.id)
        temporary.replace(folder / NAME)

    def withdraw(self, record: Record) -> None:
        """Remove the written record: there is nothing to run."""
        (Path(record.folder) / NAME).unlink(missing_ok=True)

    def close(self) -> None:
        pass


def is_unfinished(folder: Path, run_id: str) -> bool:
    """Return whether a folder has no record of that run, or one that was written before the run ended."""
    try:
        found = json.loads((folder / NAME).read_text())
        return bool(found["run"]["id"] != run_id or found["run"]["finished_at"] is None)
    except (OSError, ValueError, KeyError, TypeError):
        return True


def to_json(record: Record) -> str:
    """Return the text of `result.json`."""
    return json.dumps(record.to_dict(), indent=2, allow_nan=False)


def _set_aside(path: Path, run_id: str) -> None:
    """Rename the record of another run, which an earlier sweep has left here, after that run."""
    try:
        other = json.loads(path.read_text())["run"]["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if other != run_id:
        path.rename(path.with_name(f"result-{folders.slug(str(other))}.json"))
