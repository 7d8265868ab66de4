"""Decoder layers with streamed weights: Hugging Face's own modules, with parameters that point into slabs."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from math import ceil
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from zi_experiments.cost_model.spec import ELEMENT_BYTES
from zi_experiments.engines.stream.expert_pool import Source as ExpertSource
from zi_experiments.engines.stream.experts import RoutedExperts
from zi_experiments.engines.stream.few_tokens import FewTokens
from zi_experiments.engines.stream.fixed_pairs import Counts
from zi_experiments.engines.stream.host_experts import HostExperts
from zi_experiments.engines.stream.host_layers import HostLayer, has_room_for
from zi_experiments.engines.stream.micro_batches import in_blocks
from zi_experiments.engines.stream.own_weights import OwnWeights
from zi_experiments.engines.stream.packed_linear import PackedLinears
from zi_experiments.engines.stream.placement.parts import LayerPlacement
from zi_experiments.engines.stream.quantized import expand, expand_own
from zi_experiments.engines.stream.ring import Source
from zi_experiments.engines.stream.slab import Layout, expanded_views, experts_in, plain_views


class StreamedLayer:
    """Replaces the `forward` of one decoder layer.

    Quantized parameters always point into `expanded`, the buffer that all layers share. Other resident parameters point
    into `resident`, and other streamed ones into the slot that has their slab.
    """

    def __init__(
        self,
        layer: nn.Module,
        placed: LayerPlacement,
        resident: torch.Tensor,
        expanded: torch.Tensor,
        micro_batches: int,
        host: HostLayer | None = None,
    ) -> None:
        """`host` computes the layer's decode steps."""
        self._layer, self._placed, self._host = layer, placed, host
        self.resident = resident  # the slab of the weights that stay on the device
        first = placed.resident.elements
        last = first + placed.streamed.elements
        self._expanded = expanded[:first], expanded[first:last]
        self._dtype, self._micro_batches = expanded.dtype, micro_batches
        self._forward = layer.forward
        self._slots: dict[int, dict[str, nn.Parameter]] = {}  # parameters in each slot, by its address
        self._source: Source | None = None
        self._index = 0
        self._experts: RoutedExperts | None = None
        self._packed: PackedLinears | None = None
        self._own: OwnWeights | None = None
        self._few = FewTokens()
        self._first_on_host = 0
        fixed = plain_views(resident, placed.resident, self._dtype)
        fixed |= expanded_views(self._expanded[0], placed.resident)
        self._point(_as_parameters(fixed | expanded_views(self._expanded[1], placed.streamed)))
        layer.forward = self._run

    def attach(self, source: Source, index: int, first_on_host: int = 0) -> None:
        """Set the source of the slab; `index` counts the streamed layers only, `first_on_host` all of the model."""
        self._source, self._index, self._first_on_host = source, index, first_on_host

    def resident_experts(self) -> torch.Tensor | None:
        """Return the experts that stay on the device, of shape (experts, bytes); None if the layer has none there."""
        return experts_in(self.resident, self._placed.resident) if self._placed.resident.experts else None

    def shorten(
        self,
        few: FewTokens,
        experts: ExpertSource | None,
        counts: Counts,
        own: OwnWeights | None,
        on_host: Callable[[Any, Layout], HostExperts] | None,
    ) -> RoutedExperts | None:
        """Compute passes of few tokens in other ways, with routed experts from `experts`. Return what computes them.

        `own` brings the layer's other weights that do not stay on the device. `on_host` is called with the module of experts
        and the layout of one, and makes what the host computes.
        """
        self._own = own if self._placed.streamed.own_bytes else None
        self._few, packed = few, PackedLinears(self._layer, self.resident, self._placed.resident)
        self._packed = packed if packed.complete else None
        if experts is not None:
            self._experts = self._routed(experts, counts, on_host)
        return self._experts

    def _routed(
        self, source: ExpertSource, counts: Counts, on_host: Callable[[Any, Layout], HostExperts] | None
    ) -> RoutedExperts:
        places = ((self._placed.resident, self._expanded[0]), (self._placed.streamed, self._expanded[1]))
        layout, expanded = next(place for place in places if place[0].experts)
        assert layout.experts is not None
        each = layout.experts.each
        module = self._layer.get_submodule(each.names[0].rpartition(".")[0])
        host = on_host and on_host(module, each)
        return RoutedExperts(module, each, source, expanded[layout.own_elements :], self._few, counts, host)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._layer.parameters()

    def held(self, shared: set[nn.Parameter]) -> Iterator[tuple[str, int, bool]]:
        """Yield each parameter's name in the layer, its size in 16-bit elements, and whether it stays on the device.

        The buffer that it points into decides. Parameters in no buffer are 16-bit ones of a streamed slab. Parameters
        `shared` with other layers are left out, since no slab has them.
        """
        resident, streamed = self._expanded
        for name, parameter in self._layer.named_parameters():
            if parameter in shared:
                continue
            numel, is_resident = parameter.numel(), _lies_in(parameter, resident)
            if is_resident or _lies_in(parameter, streamed):
                packing = (self._placed.resident if is_resident else self._placed.streamed).packings[name]
                numel = ceil(packing.nbytes(parameter.shape) / ELEMENT_BYTES)
            yield name, numel, is_resident or _lies_in(parameter, self.resident)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        tokens: int = states.shape[:-1].numel()
        is_step = self._source is not None and self._is_host_step(states, (*args, *kwargs.values()))
        if is_step and self._host is not None:
            return self._host.run(args, kwargs)
        routed: AbstractContextManager[None] = nullcontext()
        if (self._experts is not None or self._own is not None) and tokens <= self._few.routed:
            routed = self._experts.routed() if self._experts is not None else routed
        elif self._source is not None:
            return self._run_streamed(args, kwargs, is_step)
        elif self._placed.resident.experts:
            expand(self.resident, self._placed.resident, self._expanded[0])
            return self._compute(args, kwargs)
        with routed, self._own_weights(tokens):
            return self._compute(args, kwargs)

    def _is_host_step(self, states: torch.Tensor, values: tuple[Any, ...]) -> bool:
        """Return whether the host computes some layers of this pass. All layers say the same."""
        if states.shape[-2] > self._few.on_host:
            return False
        return all(has_room_for(value, self._first_on_host) for value in values if isinstance(value, Cache))

    def _run_streamed(self, args: tuple[Any, ...], kwargs: dict[str, Any], is_step: bool) -> Any:
        assert self._source is not None
        expand(self.resident, self._placed.resident, self._expanded[0])
        slab = self._source.take(self._index, is_step=is_step)
        self._point(self._in_slot(slab))
        expand(slab, self._placed.streamed, self._expanded[1])
        output = self._compute(args, kwargs)
        self._source.hand_back()
        return output

    def _own_weights(self, tokens: int) -> AbstractContextManager[None]:
        """Return a context for weights beside experts: they are brought, and expanded or multiplied as packed."""
        if self._packed is not None and tokens <= self._few.packed:
            return self._packed.used()
        expand_own(self.resident, self._placed.resident, self._expanded[0])
        if self._own is not None:
            slab = self._own.bring(self._index)
            self._point(_as_parameters(plain_views(slab, self._placed.streamed.own, self._dtype)))
            expand_own(slab, self._placed.streamed, self._expanded[1])
        return nullcontext()

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return in_blocks(self._forward, args, kwargs, self._micro_batches)

    def _in_slot(self, slab: torch.Tensor) -> dict[str, nn.Parameter]:
        address = slab.data_ptr()
        if address not in self._slots:
            self._slots[address] = _as_parameters(plain_views(slab, self._placed.streamed, self._dtype))
        return self._slots[address]

    def _point(self, parameters: dict[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            owner, _, key = name.rpartition(".")
            self._layer.get_submodule(owner)._parameters[key] = parameter


def _lies_in(tensor: torch.Tensor, buffer: torch.Tensor) -> bool:
    return buffer.data_ptr() <= tensor.data_ptr() < buffer.data_ptr() + buffer.nbytes


def _as_parameters(tensors: dict[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
