"""DeepSpeed does not look at the results of its writes: here each is looked at before its buffer is given away."""

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from zi_experiments.engines.deepspeed.patches import replaced


def checking_writes() -> AbstractContextManager[None]:
    """Raise `OSError`, in one line, as soon as a weight that was written to disk is not there whole.

    A full disk would end in wrong logits instead: what is not there is read back as zeros.
    """
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper

    def wrap(original: Any) -> Any:
        def synchronize_writes(self: Any) -> None:
            paths, buffers = self._get_swap_paths(self.swap_out_params), self._get_swap_buffers(self.swap_out_params)
            original(self)
            # the buffers may be taken for other weights from here on, but nobody has done so yet
            for path, buffer in zip(map(Path, paths), buffers, strict=True):
                written = bytes_written(path, buffer)
                if written < buffer.nbytes:
                    raise _failure(path, written, buffer.nbytes)

        return synchronize_writes

    return replaced(AsyncPartitionedParameterSwapper, "synchronize_writes", wrap)


def bytes_written(path: Path, buffer: Any) -> int:
    """How many bytes of a buffer a file holds that was new when the buffer was written to it, up to the first missing.

    Several threads write their parts at once, so what failed need not be the end: it leaves a hole, which reads as
    zeros. A file system that compresses makes holes of zeros that were written as well; so a hole is a failure where the
    buffer is not zero, and nowhere else. A file system that knows no holes (NFS before 4.2) reports none, and the size
    alone decides.
    """
    import torch

    expected: torch.Tensor = buffer.view(torch.uint8)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for start, end in _holes(file.fileno(), size):
            if expected[start:end].any():
                return start
    return min(size, expected.numel())


def _holes(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and end of each part of a file that was never written, blocks that are merely allocated among them."""
    position = 0
    while position < size and (hole := os.lseek(descriptor, position, os.SEEK_HOLE)) < size:
        try:
            position = os.lseek(descriptor, hole, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            position = size  # there is no data after this hole
        yield hole, position


def _failure(path: Path, written: int, expected: int) -> OSError:
    disk = next(parent for parent in path.parents if parent.is_mount())
    free = shutil.disk_usage(disk).free
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < expected:
        advice = f"a file may have {limit} bytes at most: ulimit -f unlimited"
    elif free < expected - written:
        advice = f"free space on {disk}, or pass offload.path=/a/larger/disk"
    else:
        advice = "there is room, so look for a quota or, with dmesg, for a fault; or pass offload.path=/another/disk"
    return OSError(
        f"{path} holds {written} of the {expected} bytes of a weight that was written to it, and {disk} has {free} bytes "
        f"free: {advice}"
    )
