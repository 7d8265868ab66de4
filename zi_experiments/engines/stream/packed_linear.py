"""Linear layers whose weights stay on the device: products with a few tokens, for which nothing is expanded."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from zi_experiments.engines.stream.quantized import multiplies, multiply_packed
from zi_experiments.engines.stream.slab import Layout


class PackedLinears:
    """Replaces the `forward` of the linear layers in a decoder layer, whose quantized weights are in one slab."""

    def __init__(self, layer: nn.Module, slab: torch.Tensor, layout: Layout) -> None:
        """Raises nothing: where a weight is not one of a linear layer, or there is no kernel, `complete` is False."""
        self._slab, self._layout = slab[None], layout
        owners = [(place.name, layer.get_submodule(place.name.rpartition(".")[0])) for place in layout.quantized]
        self.complete = multiplies(layout, slab) and all(type(module) is nn.Linear for _, module in owners)
        self._linears: list[tuple[Any, str, Any]] = [(module, name, module.forward) for name, module in owners]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Multiply as packed in the context."""
        for module, name, _ in self._linears:
            module.forward = partial(self._product, module, name)
        try:
            yield
        finally:
            for module, _, forward in self._linears:
                module.forward = forward

    def _product(self, module: nn.Linear, name: str, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        numbers, zeros = _pairs(len(rows), x.device)
        out = multiply_packed(rows, (numbers, zeros, numbers), self._slab, self._layout, name)
        if module.bias is not None:
            out += module.bias
        return out.view(*x.shape[:-1], -1)


@cache
def _pairs(count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 0, 1, … `count` − 1, and as many zeros."""
    return torch.arange(count, device=device), torch.zeros(count, dtype=torch.long, device=device)
