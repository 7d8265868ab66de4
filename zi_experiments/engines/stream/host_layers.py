"""Decoder layers that compute decode steps on the host's cores, from their slabs in host memory."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from zi_experiments.engines.host_kv_cache import HostLayer as CachedLayer
from zi_experiments.engines.stream.host_product import of_slab, use
from zi_experiments.engines.stream.micro_batches import BlockCache, in_blocks
from zi_experiments.engines.stream.slab import Layout, plain_views

OUTPUTS = 2  # pinned buffers for outputs: the device may still read one while the host writes the next


def has_room_for(cache: Cache, index: int) -> bool:
    """Return whether a KV cache keeps that layer's part where the host can append to it."""
    if isinstance(cache, BlockCache):
        cache = cache.parts[0]
    return index < len(cache.layers) and isinstance(cache.layers[index], CachedLayer)


class Crossing:
    """What layers are called with goes to the host, and their outputs come back, through pinned buffers.

    What all layers of a step share, such as masks and rotary tables, crosses once in a step. Between two layers of the host
    nothing crosses back and forth.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shared: dict[int, tuple[Any, Any]] = {}  # by identity: what crossed in this step, and its copy
        self._latest = -1  # the layer that was computed last
        self._output: tuple[Any, Any] = (None, None)  # of that layer, on the device and on the host
        on_gpu = device.type == "cuda"
        self._into = _Pinned() if on_gpu else None
        self._out = cycle([_Pinned() for _ in range(OUTPUTS * on_gpu)])

    def enter(self, index: int) -> None:
        """Begin a layer; a layer that does not come after the last one begins a step."""
        if index <= self._latest:
            self._shared.clear()
            self._output = None, None
        self._latest = index

    def states(self, states: torch.Tensor) -> torch.Tensor:
        """Return a layer's hidden states on the host, when the device has computed them."""
        if states is self._output[0]:
            output: torch.Tensor = self._output[1]
            return output
        if self._into is None:
            return states
        copy = self._into.like(states)
        copy.copy_(states, non_blocking=True)
        self._into.used.record()
        self._into.used.synchronize()
        return copy

    def shared(self, value: Any) -> Any:
        """Return an argument of a layer on the host."""
        if isinstance(value, torch.Tensor):
            if value.device.type == "cpu":
                return value
            if id(value) not in self._shared:
                self._shared[id(value)] = value, value.to("cpu")
            return self._shared[id(value)][1]
        if isinstance(value, tuple | list):
            return type(value)(self.shared(one) for one in value)
        if isinstance(value, dict):
            return {key: self.shared(one) for key, one in value.items()}
        return value

    def back(self, output: Any) -> Any:
        """Return a layer's output on the device."""
        if isinstance(output, tuple):
            return (self._states_back(output[0]), *(self._other_back(one) for one in output[1:]))
        return self._states_back(output)

    def _states_back(self, states: torch.Tensor) -> torch.Tensor:
        back = states
        if self._device.type == "cuda":
            from zi_experiments.engines.stream.pinned_kernel import read  # imports Triton, which a CPU does not need

            pinned = next(self._out)
            pinned.used.synchronize()
            back = read(pinned.like(states).copy_(states), self._device)
            pinned.used.record()
        self._output = back, states
        return back

    def _other_back(self, value: Any) -> Any:
        return value.to(self._device) if isinstance(value, torch.Tensor) else value


class _Pinned:
    """A pinned buffer, and an event for its last copy."""

    def __init__(self) -> None:
        self.used = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._held = torch.empty(0)

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the buffer with the shape and type of a tensor."""
        if self._held.shape != tensor.shape or self._held.dtype != tensor.dtype:
            self._held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return self._held


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
    ) -> None:
        """`slab` has all of the layer's own weights. Made before anything replaces the layer's `forward`."""
        self._index, self._crossing, self._micro_batches = index, crossing, micro_batches
        packed = {place.name: place for place in layout.quantized}
        self._module = _on_host(layer, plain_views(slab, layout, dtype), packed)
        use(self._module, {name: partial(of_slab, slab, layout, place, dtype) for name, place in packed.items()})

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return on the device what the layer returns for arguments on the device."""
        crossing = self._crossing
        crossing.enter(self._index)
        given: dict[str, Any] = {key: crossing.shared(one) for key, one in kwargs.items() if key != "hidden_states"}
        if args:
            args = crossing.states(args[0]), *(crossing.shared(one) for one in args[1:])
        else:
            given["hidden_states"] = crossing.states(kwargs["hidden_states"])
        return crossing.back(in_blocks(self._forward, args, given, self._micro_batches))

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
