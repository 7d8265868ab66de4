"""A lock on a folder, which goes with the process that holds it, however that ends. Nothing is written."""

import fcntl
import os
from pathlib import Path


class FolderLock:
    """Held from `acquire` to `release`; processes started meanwhile do not inherit it."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def acquire(self) -> bool:
        """Whether the lock is ours now; False: another process has it. Raises `OSError` on a filesystem without locks."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        os.close(self._descriptor)
