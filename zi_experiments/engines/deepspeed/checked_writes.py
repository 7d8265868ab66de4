"""Checks of DeepSpeed's writes to disk, whose results it ignores: each is checked before its buffer is used again."""

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
    """Raise `OSError`, in one line, as soon as a weight is not completely on disk after its write.

    A full disk would give wrong logits instead: missing parts are read back as zeros.
    """
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper

    def wrap(original: Any) -> Any:
        def synchronize_writes(self: Any) -> None:
            paths, buffers = self._get_swap_paths(self.swap_out_params), self._get_swap_buffers(self.swap_out_params)
            original(self)
            # from here on the buffers may be used for other weights, but none of them is yet
            for path, buffer in zip(map(Path, paths), buffers, strict=True):
                written = bytes_written(path, buffer)
                if written < buffer.nbytes:
                    raise _failure(path, written, buffer.nbytes)

        return synchronize_writes

    return replaced(AsyncPartitionedParameterSwapper, "synchronize_writes", wrap)


def bytes_written(path: Path, buffer: Any) -> int:
    """Return how many bytes of `buffer` are in the file at `path`, up to the first missing one; the file was new.

    Several threads write their parts at once, so the failed part need not be the last one. It leaves a hole, read back
    as zeros. A file system that compresses also makes holes of zeros that were written. So a hole is a failure only if
    the buffer is not zero there. A file system without holes (NFS before 4.2) reports none: the size alone decides.
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
    """Yield start and end of each part of a file that was never written, blocks that are only allocated included."""
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
