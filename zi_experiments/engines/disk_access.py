"""How the engine of a run reads from disk, for a disk to be measured in the same way."""

from pathlib import Path

from zi_experiments.calibration.disk import Disk
from zi_experiments.config.schema import Run
from zi_experiments.engines.stream.placement import BUFFERS, CHUNK_BYTES, PARALLEL

MOST_IN_FLIGHT = 64
_MOST_BUFFER_BYTES = 1 << 30  # of all requests together


def disk_of(run: Run, folder: Path) -> Disk:
    """The disk of a folder as the engine of a run reads there.

    `stream` reads each of its buffers in so many parts at a time. DeepSpeed has a queue for each thread; what its profiles
    take by default, and what others leave to the kernel, is more than a disk can tell from `MOST_IN_FLIGHT`.
    """
    aio = run.offload.aio
    block_bytes = aio.block_size or CHUNK_BYTES
    if run.engine.name == "stream":
        in_flight = (aio.intra_op_parallelism or PARALLEL) * BUFFERS
    else:
        in_flight = (aio.intra_op_parallelism or MOST_IN_FLIGHT) * (aio.queue_depth or MOST_IN_FLIGHT)
    most = min(MOST_IN_FLIGHT, max(1, _MOST_BUFFER_BYTES // block_bytes))
    return Disk(folder=folder, block_bytes=block_bytes, in_flight=min(in_flight, most))
