"""How engines read from disk, so that a disk is measured in the same way."""

from pathlib import Path

from zi_experiments.system.disk import Disk

BLOCK_BYTES = 8 << 20  # of a request, unless the engine or the user says otherwise
MOST_IN_FLIGHT = 64
_MOST_BUFFER_BYTES = 1 << 30  # of all requests together


def reading(folder: Path, block_bytes: int | None, in_flight: int) -> Disk:
    """The disk of a folder, read by so many requests of `block_bytes` at a time, but no more than a disk can tell apart."""
    block_bytes = block_bytes or BLOCK_BYTES
    most = min(MOST_IN_FLIGHT, max(1, _MOST_BUFFER_BYTES // block_bytes))
    return Disk(folder=folder, block_bytes=block_bytes, in_flight=min(in_flight, most))
