"""The runs of one `-m` command."""

from pathlib import Path
from typing import Any

from zi_experiments.locks import FolderLock


class Sweep:
    """What a `-m` command has done so far."""

    def __init__(self) -> None:
        self.jobs: list[tuple[list[str], dict[str, Any]]] = []  # overrides and record of each
        self.has_failed = False  # one of them, or more
        self._lock: FolderLock | None = None

    def is_ours(self, folder: Path) -> bool:
        """Whether no other process is running the sweep of that folder; from then on it is ours until this process ends."""
        if self._lock is None:
            lock = FolderLock(folder)
            try:
                if not lock.acquire():
                    return False
            except OSError:
                pass  # a filesystem without locks
            self._lock = lock
        return True

    def add(self, overrides: list[str], result: dict[str, Any]) -> None:
        self.jobs.append((overrides, result))
