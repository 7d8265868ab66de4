"""Host memory of exactly the size that is asked for, in pages of its own, pinned or not."""

import mmap
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any


class _Pages(mmap.mmap):
    """Anonymous pages that CUDA may know: `cudaHostRegister` wants to be told before they are unmapped."""

    def __init__(self, *args: Any) -> None:
        self._unregister: Callable[[], Any] = lambda: None

    def register(self, address: int) -> None:
        register(address, len(self))
        # bound now: when Python shuts down, nothing can be imported any more
        self._unregister = partial(_cudart().cudaHostUnregister, address)

    def __del__(self) -> None:
        self._unregister()


def host_empty(numel: int, dtype: Any, *, pinned: bool) -> Any:
    """A tensor in pages of its own, so that disks can read into it around the page cache."""
    import torch

    pages = _Pages(-1, numel * dtype.itemsize)
    with suppress(OSError):  # a kernel without transparent huge pages refuses
        pages.madvise(mmap.MADV_HUGEPAGE)
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
