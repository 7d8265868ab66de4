"""Host memory of exactly the requested size, in its own pages, pinned or not."""

import mmap
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any


class Pages(mmap.mmap):
    """Anonymous memory in huge pages if possible, which can be registered with CUDA and is unregistered when it is freed.

    Disks fill huge pages faster: a request has a limited number of segments, and each separate page takes one.
    """

    def __new__(cls, nbytes: int) -> "Pages":
        # private, while Python's default is shared: shared memory has huge pages only where the administrator allows them
        return super().__new__(cls, -1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def __init__(self, nbytes: int) -> None:
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


def pinned_empty(numel: int, dtype: Any) -> Any:
    return host_empty(numel, dtype, pinned=True)


def _cudart() -> Any:
    import torch

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def register(address: int, size: int) -> None:
    """Pin `size` bytes at `address` with CUDA, so that copies from them run asynchronously. Raises torch's CUDA errors."""
    import torch

    torch.cuda.check_error(int(_cudart().cudaHostRegister(address, size, 0)))
