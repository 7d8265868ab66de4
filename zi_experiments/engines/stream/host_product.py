"""16-bit products of few rows on the host at the rate at which its cores read memory; torch's reach about a half of it."""

import ctypes
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from zi_experiments.engines.stream import host_library

STEP = 32  # inputs are a multiple of it
MOST_ROWS = 8  # with more of them, torch's products are faster


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "bias")),
        *((name, ctypes.c_size_t) for name in ("inputs", "outputs")),
    )


class HostLinear(nn.Module):
    """A linear layer on the host, with the parameters of another."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        _library()  # compiled now, not in the first step

    @cached_property
    def _matrix(self) -> _Matrix:
        outputs, inputs = self.weight.shape
        return _Matrix(self.weight.data_ptr(), None if self.bias is None else self.bias.data_ptr(), inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[:-1].numel()
        if rows > MOST_ROWS:
            return linear(x, self.weight, self.bias)
        wide, out = x.reshape(rows, -1).float().contiguous(), x.new_empty(*x.shape[:-1], len(self.weight))
        _library().multiply(self._matrix, wide.data_ptr(), out.data_ptr(), rows, x.dtype == torch.bfloat16)
        return out


def use(layer: nn.Module) -> None:
    """Replace the linear layers of a module, as far as the kernel supports them."""
    for path, module in [*layer.named_modules()]:
        if type(module) is nn.Linear and module.in_features % STEP == 0 and module.weight.dtype.itemsize == 2:
            owner, _, key = path.rpartition(".")
            setattr(layer.get_submodule(owner), key, HostLinear(module))


@cache
def _library() -> Any:
    library = host_library.load("host_product")
    address = ctypes.c_void_p
    library.multiply.argtypes = ctypes.POINTER(_Matrix), address, address, ctypes.c_size_t, ctypes.c_int
    library.multiply.restype = None
    return library
