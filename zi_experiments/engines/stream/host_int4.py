"""INT4 products on the host, of weights as they are in a slab."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import nn

from zi_experiments.engines.stream import host_library
from zi_experiments.engines.stream.quantized import Packed


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "minima", "bias")),
        *((name, ctypes.c_size_t) for name in ("inputs", "outputs", "group")),
    )


class Int4Linear(nn.Module):
    """A linear layer with a packed weight; products have float32 sums, and are rounded once."""

    def __init__(self, weight: Packed, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._weight, self.bias = weight, bias
        outputs, nbytes = weight.codes.shape
        tensors = [*weight, bias]
        addresses = [None if one is None else one.data_ptr() for one in tensors]
        self._matrix = _Matrix(*addresses, 2 * nbytes, outputs, 2 * nbytes // weight.scales.shape[1])
        _library()  # compiled now, not in the first step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, rows = x.contiguous(), x.shape[:-1]
        assert x.dtype is self._weight.scales.dtype
        assert x.shape[-1] == self._matrix.inputs
        out = x.new_empty(*rows, self._matrix.outputs)
        is_bfloat16 = x.dtype is torch.bfloat16
        if _library().multiply(self._matrix, x.data_ptr(), out.data_ptr(), rows.numel(), is_bfloat16):
            raise MemoryError("no memory for the inputs of a product on the host")
        return out


def use(layer: nn.Module, found: dict[str, Packed]) -> None:
    """Replace the linear layers of a module whose weights are given by name; biases stay."""
    for name, weight in found.items():
        path = name.rpartition(".")[0]
        owner, _, key = path.rpartition(".")
        linear: Any = layer.get_submodule(path)
        setattr(layer.get_submodule(owner), key, Int4Linear(weight, linear.bias))


@cache
def _library() -> Any:
    library, address = host_library.load("host_int4"), ctypes.c_void_p
    library.multiply.argtypes = ctypes.POINTER(_Matrix), address, address, ctypes.c_size_t, ctypes.c_int
    library.multiply.restype = ctypes.c_int
    return library
