"""How engines read from disk. A disk is measured in the same way."""

from collections.abc import Sequence
from pathlib import Path

from zi_experiments.config.schema import ConfigError, Run
from zi_experiments.system.disk import Disk

BLOCK_BYTES = 8 << 20  # of one request, unless the engine or the user sets another size
MOST_IN_FLIGHT = 64  # requests; more make no difference to a disk
_MOST_BUFFER_BYTES = 1 << 30  # of all requests together


def reading(folders: Sequence[Path], block_bytes: int | None, in_flight: int) -> Disk:
    """Return the disks of `folders`, each read by `in_flight` requests of `block_bytes` at a time, up to the limits above."""
    block_bytes = block_bytes or BLOCK_BYTES
    most = min(MOST_IN_FLIGHT, max(1, _MOST_BUFFER_BYTES // block_bytes))
    return Disk(folders=tuple(folders), block_bytes=block_bytes, in_flight=min(in_flight, most))


def check_one_folder(run: Run) -> None:
    """Raise `ConfigError` for weights that are to be spread over several drives, for engines that write to one."""
    if len(run.offload.folders) > 1:
        first = run.offload.folders[0]
        raise ConfigError(
            f"offload.path={run.offload.path} names several folders, and engine={run.engine.name} writes to one: "
            f"pass offload.path={first}, or engine=stream"
        )
