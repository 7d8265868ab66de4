"""Free device memory while the model does not run: its slabs wait in host memory, and come back bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def parked(expanded: torch.Tensor, slabs: list[torch.Tensor], nbytes: int) -> Iterator[None]:
    """Move the first `slabs` that have `nbytes` together to pageable host memory, and free `expanded`, in the context.

    The content of `expanded` is lost: every layer writes it before reading it. Storages are emptied and filled again in
    place, so that parameters, which are views of them, stay valid.
    """
    waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
    for slab in slabs:
        if sum(copy.nbytes for _, copy in waiting) >= nbytes:
            break
        waiting.append((slab, slab.to("cpu", copy=True)))
        slab.untyped_storage().resize_(0)
    room = expanded.untyped_storage().nbytes()
    expanded.untyped_storage().resize_(0)
    torch.cuda.empty_cache()  # cached blocks of these sizes fit nothing else
    try:
        yield
    finally:
        torch.cuda.empty_cache()
        expanded.untyped_storage().resize_(room)
        for slab, copy in waiting:
            slab.untyped_storage().resize_(copy.nbytes)
            slab.copy_(copy)
