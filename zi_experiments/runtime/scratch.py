"""Temporary folders of a run: locked while it executes, removed at its end.

A link in the cache points to each. So the next run finds and removes those of a killed run, wherever it writes itself.
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
from zi_experiments.system.disk import folder_problem

_NAME = re.compile("zi-[0-9a-f]{12}")


def bases_for_weights(run: Run, default: Path) -> list[Path]:
    """Return the parent folders for weights on disk, one for each drive: those of `offload.path`, or else `default`."""
    return [Path(folder).expanduser().resolve() for folder in run.offload.folders] or [default]


def check_bases(key: str, folders: list[str]) -> None:
    """Raise `ConfigError` for a weights folder that is missing, or named twice.

    If it were created, it could be on another disk than intended.
    """
    found = set()
    for folder in folders:
        if problem := folder_problem(f"{key}=", folder):
            raise ConfigError(problem)
        path = Path(folder).expanduser().resolve()
        if path in found:
            raise ConfigError(f"{key} names {path} twice: pass {key}=[/a,/b] with a folder on each drive")
        found.add(path)


def for_weights(run: Run, default: Path, run_id: str) -> list[Path]:
    """Return the folders of a run's weights on disk, below `bases_for_weights`; none when it has no weights on disk.

    `run_id` is 12 hexadecimal digits, unique to the run.
    """
    if run.offload.device is not OffloadDevice.nvme:
        return []
    return [base / f"zi-{run_id}" for base in bases_for_weights(run, default)]


def for_temporary_files(run_id: str) -> Path:
    """Return the folder of the workers' temporary files, which a killed worker does not remove itself."""
    return Path(tempfile.gettempdir()) / f"zi-{run_id}"


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """For a while, have `tempfile` and its users make their files in `folder`."""
    before = tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


class Scratch:
    """Creates the folder and locks it; `close` removes it with its content."""

    def __init__(self, path: Path) -> None:
        self.path = path
        new = path.with_name(f".{path.name}")
        new.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir(mode=0o700)
        self._lock = FolderLock(new)
        with suppress(OSError):  # on a filesystem without locks, no run takes it for abandoned either
            self._lock.acquire()
        new.rename(path)  # so that under its final name it is always locked
        with suppress(OSError):  # without a link, only runs that write beside it find it
            _links().mkdir(parents=True, exist_ok=True)
            _link(path).symlink_to(path.absolute())

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        _forget(self.path)
        self._lock.release()


def remove_abandoned(*bases: Path) -> list[Path]:
    """Remove, and return, the folders of runs that were killed with their launcher.

    Looks below `bases`, and wherever this user's runs on this machine have created folders.
    """
    there = [path for base in bases if base.is_dir() for path in sorted(base.glob("zi-*"))]
    removed = []
    for path in dict.fromkeys([*there, *_linked()]):
        if _NAME.fullmatch(path.name) and _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
        if not path.exists():
            _forget(path)
    return removed


def is_held(path: Path) -> bool:
    """Return whether the folder exists and the process that created it still runs."""
    return path.is_dir() and not _is_abandoned(path)


def _links() -> Path:
    # by host name: machines may share a home, but not their disks
    return environment.cache_folder() / "scratch" / platform.node()


def _linked() -> Iterator[Path]:
    for link in _links().glob("*"):
        with suppress(OSError):  # another run has just removed it
            yield link.readlink()


def _link(path: Path) -> Path:
    # by full path: the folders of one run have the same name in several places
    return _links() / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]


def _forget(path: Path) -> None:
    with suppress(OSError):
        _link(path).unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    try:
        lock = FolderLock(path)
    except OSError:
        return False  # just removed, or of another user
    try:
        return path.lstat().st_uid == os.getuid() and lock.acquire()
    except OSError:
        return False
    finally:
        lock.release()
