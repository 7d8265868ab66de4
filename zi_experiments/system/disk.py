"""Folders as what they are on: a disk, its filesystem, and what is free there."""

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """A folder, which may be yet to be made, and how a run reads there."""

    folder: Path
    block_bytes: int  # of a request
    in_flight: int  # requests at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """The filesystem of a folder."""

    device: str
    mountpoint: str
    kind: str


def existing(folder: Path) -> Path:
    """The folder, or else the nearest above it that is there, which is on the same disk."""
    folder = folder.expanduser().resolve()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def free_bytes(folder: Path) -> int | None:
    """What is free on the disk of a folder, which may be yet to be made; None where that cannot be known."""
    with suppress(OSError):
        return shutil.disk_usage(existing(folder)).free
    return None


def mount_of(folder: Path) -> Mount:
    """The filesystem of a folder that is there."""
    import psutil

    above = {str(path) for path in (folder, *folder.parents)}
    found = [part for part in psutil.disk_partitions(all=True) if part.mountpoint in above]
    # the last of several at one place hides the others
    part = max(reversed(found), key=lambda part: len(part.mountpoint), default=None)
    if part is None:
        return Mount(device="", mountpoint="/", kind="")  # a container that hides its own
    return Mount(device=part.device, mountpoint=part.mountpoint, kind=part.fstype)
