"""Host memory of exactly the requested size, in its own pages, pinned or not."""

import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any


class Pages(mmap.mmap):
    """Memory that can be registered with CUDA, and is unregistered when it is freed: anonymous, or that of a descriptor.

    Anonymous memory is in huge pages if possible. Disks fill those faster: a request has a limited number of segments, and
    each separate page takes one.
    """

    def __new__(cls, nbytes: int, descriptor: int = -1) -> "Pages":
        if descriptor >= 0:
            return super().__new__(cls, descriptor, nbytes, flags=mmap.MAP_SHARED)
        # private, while Python's default is shared: shared memory has huge pages only where the administrator allows them
        return super().__new__(cls, -1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def __init__(self, nbytes: int, descriptor: int = -1) -> None:
        self._unregister: Callable[[], Any] = lambda: None
        self.madvise(mmap.MADV_DONTFORK)  # else, after a fork, the device may keep the child's copy of a page
        with suppress(OSError):  # a kernel without transparent huge pages refuses
            self.madvise(mmap.MADV_HUGEPAGE)

    def register(self, address: int) -> None:
        register(address, len(self))
        # bound now: while Python shuts down, nothing can be imported
        self._unregister = partial(_cudart().cudaHostUnregister, address)

    def __del__(self) -> None:
        self._unregister()


def host_empty(numel: int, dtype: Any, *, pinned: bool) -> Any:
    """Return a 1-D tensor of `numel` elements in its own pages, so that disks can read into it with O_DIRECT.

    A pinned tensor is zero; otherwise the pages are not touched yet.
    """
    import torch

    pages = Pages(numel * dtype.itemsize)
    tensor = torch.frombuffer(pages, dtype=dtype, count=numel)
    if pinned:
        tensor.fill_(0)  # allocates the pages with all cores; the driver would use one
        pages.register(tensor.data_ptr())
    return tensor


def shared_empty(descriptor: int, nbytes: int, own: slice, *, pinned: bool) -> Any:
    """Return a tensor of bytes in the memory of a descriptor, which is closed; this process fills the part `own`."""
    import torch

    pages = Pages(nbytes, descriptor)
    os.close(descriptor)
    tensor = torch.frombuffer(pages, dtype=torch.uint8)
    if pinned:
        tensor[own].fill_(0)  # allocates the pages as above; the other processes do it with theirs
        pages.register(tensor.data_ptr())
    return tensor


def pinned_empty(numel: int, dtype: Any) -> Any:
    return host_empty(numel, dtype, pinned=True)


def _cudart() -> Any:
    import torch

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def register(address: int, size: int) -> None:
    """Pin `size` bytes at `address` with CUDA, so that copies from them run asynchronously. Raises torch's CUDA errors."""
    import torch

    torch.cuda.check_error(int(_cudart().cudaHostRegister(address, size, 0)))
