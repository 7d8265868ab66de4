"""Folders of its own that a run needs while it lives: locked meanwhile, and removed at its end.

A link in the cache says where each is, so that one whose run was killed is found by the next, wherever that one writes.
"""

import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zi_experiments import environment
from zi_experiments.config.schema import ConfigError, OffloadDevice, Run
from zi_experiments.runtime.locks import FolderLock

_NAME = re.compile("zi-[0-9a-f]{12}")


def base_for_weights(run: Run, default: Path) -> Path:
    """The folder for weights on disk, of any run: `offload.path`, or else `default`."""
    return Path(run.offload.path).expanduser().resolve() if run.offload.path else default


def check_base(key: str, folder: str | None) -> None:
    """Refuse a folder for weights that is not there: made, it would be on another disk than the one that was meant."""
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise ConfigError(f"{key}={folder} is no folder: mkdir -p {folder}, or pass {key}=/another/folder")


def for_weights(run: Run, default: Path, run_id: str) -> Path | None:
    """Where a run's weights on disk go, below that folder; None: it has none there.

    `run_id` is 12 hexadecimal digits of its own.
    """
    if run.offload.device is not OffloadDevice.nvme:
        return None
    return base_for_weights(run, default) / f"zi-{run_id}"


def for_temporary_files(run_id: str) -> Path:
    """Where the workers' temporary files go: one that is killed does not remove them."""
    return Path(tempfile.gettempdir()) / f"zi-{run_id}"


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Meanwhile `tempfile`, and who uses it, makes its files there."""
    before = tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


class Scratch:
    """Makes the folder; `close` removes it with all that is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        new = path.with_name(f".{path.name}")
        new.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir(mode=0o700)
        self._lock = FolderLock(new)
        with suppress(OSError):  # without locks nobody finds it abandoned either
            self._lock.acquire()
        new.rename(path)  # from the start it is locked under its name
        with suppress(OSError):  # without a cache it is found by runs that write beside it
            _links().mkdir(parents=True, exist_ok=True)
            _link(path).symlink_to(path.absolute())

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        _forget(self.path)
        self._lock.release()


def remove_abandoned(*bases: Path) -> list[Path]:
    """Remove the folders that runs have left which were killed with their launcher, and return them.

    Those below `bases`, and those that this user's runs on this machine have made anywhere.
    """
    there = [path for base in bases if base.is_dir() for path in sorted(base.glob("zi-*"))]
    removed = []
    for path in dict.fromkeys([*there, *(link.readlink() for link in _links().glob("*"))]):
        if _NAME.fullmatch(path.name) and _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
        if not path.exists():
            _forget(path)
    return removed


def is_held(path: Path) -> bool:
    """Whether the folder is there, and the process that made it too."""
    return path.is_dir() and not _is_abandoned(path)


def _links() -> Path:
    """Homes are shared between machines, whose disks are not."""
    return environment.cache_folder() / "scratch" / platform.node()


def _link(path: Path) -> Path:
    # a run's folders have one name, in several places
    return _links() / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]


def _forget(path: Path) -> None:
    with suppress(OSError):
        _link(path).unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    try:
        lock = FolderLock(path)
    except OSError:
        return False  # it has just been removed, or is not ours
    try:
        return path.lstat().st_uid == os.getuid() and lock.acquire()
    except OSError:
        return False
    finally:
        lock.release()
