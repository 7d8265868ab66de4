"""`result.json` in the run's output folder."""

import json
import os
from pathlib import Path

from zi_experiments.record import Record

NAME = "result.json"


class ResultFile:
    def open(self, record: Record) -> None:
        pass

    def write(self, record: Record) -> None:
        """Write the record whole or not at all: to a temporary name, then renamed."""
        folder = Path(record.folder)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{NAME}.tmp"
        text = json.dumps(record.to_dict(), indent=2, allow_nan=False)
        with temporary.open("w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / NAME)

    def close(self) -> None:
        pass
