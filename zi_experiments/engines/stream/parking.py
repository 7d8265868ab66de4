"""Free device memory while the model does not run: its slabs wait in host memory, and come back bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def parked(buffers: list[torch.Tensor], slabs: list[torch.Tensor], nbytes: int) -> Iterator[None]:
    """Move the first `slabs` that have `nbytes` together to pageable host memory, and free `buffers`, in the context.

    The content of `buffers` is lost. Storages are emptied and filled again in place, so that parameters, which are views
    of them, stay valid.
    """
    waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
    for slab in slabs:
        if sum(copy.nbytes for _, copy in waiting) >= nbytes:
            break
        waiting.append((slab, slab.to("cpu", copy=True)))
        slab.untyped_storage().resize_(0)
    rooms = [buffer.untyped_storage().nbytes() for buffer in buffers]
    for buffer in buffers:
        buffer.untyped_storage().resize_(0)
    torch.cuda.empty_cache()  # cached blocks of these sizes fit nothing else
    try:
        yield
    finally:
        torch.cuda.empty_cache()
        for buffer, room in zip(buffers, rooms, strict=True):
            buffer.untyped_storage().resize_(room)
        for slab, copy in waiting:
            slab.untyped_storage().resize_(copy.nbytes)
            slab.copy_(copy)
