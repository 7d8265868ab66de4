"""SHA-256 of a checkpoint's files, so that the record identifies what was loaded."""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from zi_experiments.models.checkpoint import Checkpoint

_READERS = 4  # files hashed at the same time
_CHUNK = 1 << 20


def of(checkpoint: Checkpoint, cache: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    """Return the SHA-256 of each file: `{"path": folder, "files": {name: {"bytes": …, "sha256": …}}}`.

    Each hash is cached in the folder `cache`, if that is writable, until the file changes. `advance` gets the number of
    bytes just finished, from one thread at a time; they sum up to `checkpoint.num_bytes`.
    """
    lock, stopped = threading.Lock(), threading.Event()

    def count(amount: int) -> None:
        if stopped.is_set():
            raise InterruptedError
        with lock:
            advance(amount)

    with ThreadPoolExecutor(_READERS, "hash") as readers:
        try:
            hashed = list(readers.map(partial(_hash, cache=cache / "sha256", advance=count), checkpoint.files))
        except BaseException:  # includes Ctrl-C, which should not wait for files of many gigabytes
            stopped.set()
            raise
    names = [file.name for file in checkpoint.files]
    return {"path": str(checkpoint.folder.absolute()), "files": dict(zip(names, hashed, strict=True))}


def _hash(file: Path, cache: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    state = _state(file)
    entry = cache / f"{hashlib.sha256(os.fsencode(state['path'])).hexdigest()}.json"
    sha256 = _named_by_hub(file) or _remembered(entry, state)
    if sha256 is not None:
        advance(state["bytes"])
    else:
        sha256 = _digest(file, advance)
        if _state(file) == state:
            _remember(entry, state | {"sha256": sha256})
    return {"bytes": state["bytes"], "sha256": sha256}


def _digest(file: Path, advance: Callable[[int], None]) -> str:
    """Return the hash of a file's content; unlike `hashlib.file_digest`, this reports progress."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(buffer[:count])
            advance(count)
    return digest.hexdigest()


def _state(file: Path) -> dict[str, Any]:
    """Return the properties of a file that change when its content does."""
    status = file.stat()
    return {
        "path": str(file.resolve()),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "inode": status.st_ino,
    }


def _named_by_hub(file: Path) -> str | None:
    """Return the hash of a large file in the hub's cache, where links point to files named by their hash; else None.

    Outside the cache the name proves nothing: anyone can create such a link.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    blob = file.resolve()
    is_blob = blob.parent.name == "blobs" and blob.is_relative_to(Path(HF_HUB_CACHE).resolve())
    return blob.name if is_blob and re.fullmatch("[0-9a-f]{64}", blob.name) else None


def _remembered(entry: Path, state: dict[str, Any]) -> str | None:
    try:
        content = json.loads(entry.read_bytes())
        return str(content.pop("sha256")) if content.items() >= state.items() else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _remember(entry: Path, content: dict[str, Any]) -> None:
    """Write an entry atomically: other processes may write the same one."""
    temporary = entry.with_suffix(f".{os.getpid()}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content))
        temporary.replace(entry)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
