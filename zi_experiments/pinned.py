"""Pinned host memory of exactly the size that is asked for."""

import mmap
from contextlib import suppress
from typing import Any


class _PinnedPages(mmap.mmap):
    """Anonymous pages that CUDA knows: `cudaHostRegister` wants pages of their own, told before they are unmapped."""

    def __init__(self, *args: Any) -> None:
        self._address: int | None = None

    def register(self, address: int) -> None:
        self._address = address
        register(address, len(self))

    def __del__(self) -> None:
        if self._address is not None:
            _cudart().cudaHostUnregister(self._address)


def pinned_empty(numel: int, dtype: Any) -> Any:
    """An uninitialised pinned tensor."""
    import torch

    pages = _PinnedPages(-1, numel * dtype.itemsize)
    with suppress(OSError):  # a kernel without transparent huge pages refuses
        pages.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(pages, dtype=dtype, count=numel)
    pages.register(tensor.data_ptr())
    return tensor


def _cudart() -> Any:
    import torch

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def register(address: int, size: int) -> None:
    """Tell CUDA that `size` bytes at `address` stay where they are, so that copies from them run beside compute."""
    import torch

    torch.cuda.check_error(int(_cudart().cudaHostRegister(address, size, 0)))
