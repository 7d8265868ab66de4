"""INT4 products on the host by torch's kernel for processors: it has a layout of its own, beside the slab that a GPU reads."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from zi_experiments.engines.stream.quantized import integers
from zi_experiments.engines.stream.slab import Layout

Matrix = tuple[torch.Tensor, torch.Tensor]  # packed integers; scales and zeros of shape (groups of a row, rows, 2)


class Int4Linear(nn.Module):
    """A linear layer with a packed weight."""

    def __init__(self, matrix: Matrix, group_size: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._packed, self._groups = matrix
        self._group_size, self.bias = group_size, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            flat, self._packed, self._group_size, self._groups
        )
        out = out.view(*x.shape[:-1], out.shape[-1])
        return out if self.bias is None else out + self.bias


def matrices(slab: torch.Tensor, layout: Layout, dtype: torch.dtype) -> Iterator[tuple[str, Matrix]]:
    """Yield the name of each quantized parameter in a slab on the host, and its matrix."""
    for place in layout.quantized:
        codes, scale, minimum = integers(slab, layout, place, dtype)
        step = 1 / scale.float()
        # the kernel computes (code − 8) · step + zero
        groups = torch.stack([step, minimum.float() + 8 * step], -1).transpose(0, 1).to(dtype).contiguous()
        yield place.name, (packed(codes), groups)


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Return INT4 codes, given as int32 of shape (rows, columns), in the kernel's layout."""
    found: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return found


def use(layer: nn.Module, found: dict[str, Matrix], group_size: int) -> None:
    """Replace the linear layers of a module whose weights are given by name; biases stay."""
    for name, matrix in found.items():
        path = name.rpartition(".")[0]
        owner, _, key = path.rpartition(".")
        linear: Any = layer.get_submodule(path)
        setattr(layer.get_submodule(owner), key, Int4Linear(matrix, group_size, linear.bias))
