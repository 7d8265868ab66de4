"""A lock on a folder, released when the process that holds it ends, however it ends. Nothing is written."""

import fcntl
import os
from pathlib import Path


class FolderLock:
    """A lock held from `acquire` to `release`; child processes do not inherit it."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def acquire(self) -> bool:
        """Return True if acquired, False if another process holds it. Raises `OSError` on a filesystem without locks."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        os.close(self._descriptor)
