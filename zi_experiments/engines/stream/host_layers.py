"""Decoder layers that compute decode steps on the host's cores, from their slabs in host memory."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from zi_experiments.engines.host_kv_cache import HostLayer as CachedLayer
from zi_experiments.engines.stream import host_int4, host_product
from zi_experiments.engines.stream.host_crossing import Crossing, PinnedPlace, Place
from zi_experiments.engines.stream.micro_batches import BlockCache, in_blocks
from zi_experiments.engines.stream.quantized import packed_views
from zi_experiments.engines.stream.slab import Layout, plain_views


def has_room_for(cache: Cache, index: int) -> bool:
    """Return whether a KV cache keeps that layer's part where the host can append to it."""
    if isinstance(cache, BlockCache):
        cache = cache.parts[0]
    return index < len(cache.layers) and isinstance(cache.layers[index], CachedLayer)


class HostLayer:
    """A decoder layer of its own on the host, whose parameters are views of the slab in host memory."""

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        slab: torch.Tensor,
        layout: Layout,
        dtype: torch.dtype,
        crossing: Crossing,
        micro_batches: int,
        device: torch.device,
    ) -> None:
        """`slab` has all of the layer's own weights. Made before anything replaces the layer's `forward`."""
        self._index, self._crossing, self._micro_batches = index, crossing, micro_batches
        self._place = PinnedPlace(device) if device.type == "cuda" else Place()
        packed = packed_views(slab, layout, dtype)
        self._module = _on_host(layer, plain_views(slab, layout, dtype), packed)
        host_int4.use(self._module, packed)
        host_product.use(self._module)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return on the device what the layer returns for arguments on the device."""
        crossing = self._crossing
        states, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        others = crossing.shared(rest)
        named = {key: crossing.shared(one) for key, one in kwargs.items() if key != "hidden_states"}

        def forward(here: torch.Tensor) -> Any:
            given, keywords = ((here, *others), named) if args else ((), named | {"hidden_states": here})
            return in_blocks(self._forward, given, keywords, self._micro_batches)

        return crossing.compute(self._place, states, forward)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        with _here([*args, *kwargs.values()], self._index):
            return self._module(*args, **kwargs)


@contextmanager
def _here(values: list[Any], index: int) -> Iterator[None]:
    """Append to a layer's KV cache on the host."""
    found = [cache.layers[index] for cache in values if isinstance(cache, Cache)]
    for each in found:
        each.on_host = True
    try:
        yield
    finally:
        for each in found:
            each.on_host = False


def _on_host(layer: nn.Module, weights: dict[str, torch.Tensor], replaced: Collection[str]) -> nn.Module:
    """Return a copy of a layer on the host, with these parameters; of what they lack, all but the `replaced` is copied."""
    shared = [*layer.parameters(), *(module.config for module in layer.modules() if hasattr(module, "config"))]
    copy: nn.Module = deepcopy(layer, {id(one): one for one in shared})
    for name, parameter in [*copy.named_parameters()]:
        if name in replaced:
            continue
        owner, _, key = name.rpartition(".")
        value = weights[name] if name in weights else parameter.detach().to("cpu")
        copy.get_submodule(owner)._parameters[key] = nn.Parameter(value, requires_grad=False)
    for module in copy.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = buffer.to("cpu") if buffer is not None else None
    return copy
