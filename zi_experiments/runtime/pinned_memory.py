"""Host memory of exactly the size that is asked for, in pages of its own, pinned or not."""

import mmap
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any


class Pages(mmap.mmap):
    """Anonymous pages, as large as the kernel has them, that CUDA may know: `cudaHostRegister` wants to be told before
    they are unmapped.

    A disk fills large pages faster: a request has a limited number of parts, and each page far from the last is one.
    """

    def __new__(cls, nbytes: int) -> "Pages":
        # not shared, which is Python's default: what is shared has large pages only where the machine's owner allows it
        return super().__new__(cls, -1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def __init__(self, nbytes: int) -> None:
        self._unregister: Callable[[], Any] = lambda: None
        self.madvise(mmap.MADV_DONTFORK)  # of pages that a child has as well, a device may keep the child's
        with suppress(OSError):  # a kernel without transparent huge pages refuses
            self.madvise(mmap.MADV_HUGEPAGE)

    def register(self, address: int) -> None:
        register(address, len(self))
        # bound now: when Python shuts down, nothing can be imported any more
        self._unregister = partial(_cudart().cudaHostUnregister, address)

    def __del__(self) -> None:
        self._unregister()


def host_empty(numel: int, dtype: Any, *, pinned: bool) -> Any:
    """A tensor in pages of its own, so that disks can read into it around the page cache."""
    import torch

    pages = Pages(numel * dtype.itemsize)
    tensor = torch.frombuffer(pages, dtype=dtype, count=numel)
    if pinned:
        tensor.fill_(0)  # all cores ask for the pages; the driver would, with one
        pages.register(tensor.data_ptr())
    return tensor


def pinned_empty(numel: int, dtype: Any) -> Any:
    """A pinned tensor."""
    return host_empty(numel, dtype, pinned=True)


def _cudart() -> Any:
    import torch

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def register(address: int, size: int) -> None:
    """Tell CUDA that `size` bytes at `address` stay where they are, so that copies from them run beside compute."""
    import torch

    torch.cuda.check_error(int(_cudart().cudaHostRegister(address, size, 0)))
