"""Folders of its own that a run needs while it lives: locked meanwhile, and removed at its end."""

import re
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir

from zi_experiments.config import OffloadDevice, Run
from zi_experiments.locks import FolderLock

_NAME = re.compile("zi-[0-9a-f]{12}")


def base_for_weights(run: Run, default: Path) -> Path:
    """The folder for weights on disk, of any run: `offload.path`, or else `default`."""
    return Path(run.offload.path).expanduser().resolve() if run.offload.path else default


def for_weights(run: Run, default: Path, run_id: str) -> Path | None:
    """Where a run's weights on disk go, below that folder; None: it has none there.

    `run_id` is 12 hexadecimal digits of its own.
    """
    if run.offload.device is not OffloadDevice.nvme:
        return None
    return base_for_weights(run, default) / f"zi-{run_id}"


def for_temporary_files(run_id: str) -> Path:
    """Where the workers' temporary files go: one that is killed does not remove them."""
    return Path(gettempdir()) / f"zi-{run_id}"


class Scratch:
    """Makes the folder; `close` removes it with all that is in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        new = path.with_name(f".{path.name}")
        new.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir(mode=0o700)
        self._lock = FolderLock(new)
        with suppress(OSError):  # without locks nobody finds it abandoned either
            self._lock.acquire()
        new.rename(path)  # from the start it is locked under its name

    def close(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        self._lock.release()


def remove_abandoned(base: Path) -> list[Path]:
    """Remove the folders below `base` that runs have left which were killed with their launcher, and return them."""
    removed = []
    for path in sorted(base.glob("zi-*")) if base.is_dir() else []:
        if _NAME.fullmatch(path.name) and _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def _is_abandoned(path: Path) -> bool:
    try:
        lock = FolderLock(path)
    except OSError:
        return False  # it has just been removed, or is not ours
    try:
        return lock.acquire()
    except OSError:
        return False
    finally:
        lock.release()
