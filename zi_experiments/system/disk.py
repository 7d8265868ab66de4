"""The disk and the filesystem that a folder is on, and their free space."""

import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """The disks below folders, read at the same time and in equal parts, and how a run reads there."""

    folders: tuple[Path, ...]  # need not exist yet
    block_bytes: int  # of one request
    in_flight: int  # requests in flight at the same time in each folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """The filesystem of a folder."""

    device: str
    mountpoint: str
    kind: str


def existing(folder: Path) -> Path:
    """Return `folder`, or its nearest parent that exists: it is on the same disk."""
    folder = folder.expanduser().resolve()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def folder_problem(typed: str, folder: str | Path) -> str | None:
    """Return one line that says what to type instead if `folder` is none; `typed` is what stood before it: "--path "."""
    path = Path(folder).expanduser()
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        return f"{typed}{folder} is no folder: mkdir -p {folder}, or pass {typed}/another/folder"
    except OSError as error:
        return f"{typed}{folder} cannot be read ({error.strerror}): pass {typed}/another/folder"
    return None if S_ISDIR(kind) else f"{typed}{folder} is a file: pass {typed}/a/folder"


def free_bytes(folders: list[Path]) -> int | None:
    """Return how many bytes fit into folders that need not exist yet, an equal part in each; None if unknown."""
    with suppress(OSError):
        there = [existing(folder) for folder in folders]
        disks = Counter(folder.stat().st_dev for folder in there)
        # folders on one disk share its space
        return len(there) * min(shutil.disk_usage(each).free // disks[each.stat().st_dev] for each in there)
    return None


def mount_of(folder: Path) -> Mount:
    """Return the filesystem of an existing folder."""
    import psutil

    above = {str(path) for path in (folder, *folder.parents)}
    found = [part for part in psutil.disk_partitions(all=True) if part.mountpoint in above]
    # of several mounts at one place, the last hides the others
    part = max(reversed(found), key=lambda part: len(part.mountpoint), default=None)
    if part is None:
        return Mount(device="", mountpoint="/", kind="")  # a container that hides its mounts
    return Mount(device=part.device, mountpoint=part.mountpoint, kind=part.fstype)
