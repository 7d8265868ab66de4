"""Passes of few tokens, such as decode steps: routed experts only, packed products, operations recorded once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines.base import Routed
from zi_experiments.engines.stream import routing
from zi_experiments.engines.stream.expert_pool import InHostMemory, InPlace, Pool, Source
from zi_experiments.engines.stream.few_tokens import FewTokens
from zi_experiments.engines.stream.fixed_pairs import Counts
from zi_experiments.engines.stream.host_cache import HostCache
from zi_experiments.engines.stream.host_experts import HostExperts
from zi_experiments.engines.stream.layers import StreamedLayer
from zi_experiments.engines.stream.own_weights import OwnWeights
from zi_experiments.engines.stream.placement import choice, room
from zi_experiments.engines.stream.placement.parts import LayerPlacement
from zi_experiments.engines.stream.recorded import RecordedSteps, can_record
from zi_experiments.engines.stream.slab import Layout, experts_in
from zi_experiments.engines.stream.store import Store


class ShortPasses:
    """How a loaded model computes passes of few tokens, as its plan says."""

    def __init__(
        self,
        plan: Plan,
        layers: list[StreamedLayer],
        store: Store,
        streamed: list[int],
        cache: HostCache | None,
        own: OwnWeights | None,
        device: torch.device,
    ) -> None:
        """`streamed` has the numbers of the layers that `store` has slabs of, in its order; `cache` is of those on disk.

        `own` brings what is not an expert and does not stay on the device.
        """
        stored = plan.storage
        self._few = FewTokens(
            routed=routing.most_tokens(plan) if stored.routes else 0,
            # other roundings in front of a router would choose other experts
            packed=0 if plan.experts else stored.packed_tokens,
            packed_experts=stored.packed_tokens,
            on_host=1 if stored.host_layers else 0,
        )
        self._pool: Pool | None = None
        self._cache, self._own = cache, own
        sources: dict[int, Source] = {}
        if stored.routes:
            here = {
                index: slabs for index, layer in enumerate(layers) if (slabs := layer.resident_experts()) is not None
            }
            sources = {index: InPlace(slabs) for index, slabs in here.items()}
            sources |= self._away(plan, store, streamed, device)
        self._recorded: RecordedSteps | None = None
        self._counts, on_host = Counts(device), self._on_host(plan, store, streamed)
        made = [
            layer.shorten(self._few, sources.get(index), self._counts, own, on_host.get(index))
            for index, layer in enumerate(layers)
        ]
        self._experts = [experts for experts in made if experts is not None]

    def _away(self, plan: Plan, store: Store, streamed: list[int], device: torch.device) -> dict[int, Source]:
        """Return where experts come from that do not stay on the device, by the number of their layer.

        Some models begin with layers without experts.
        """
        placed = choice.place(plan)
        away = _away(placed, streamed)
        parts = {index: placed[index].streamed for index, _ in away}
        supply: Any = self._cache or InHostMemory(
            [experts_in(store.slab(number), parts[index]) for index, number in away]
        )
        if slots := room.expert_slots(plan, placed):
            at_once = routing.at_once(plan, routing.slot_bytes(list(parts.values())))
            supply = self._pool = Pool(supply, slots, at_once, device)
        return {index: supply.source(number) for number, index in enumerate(parts)}

    def _on_host(
        self, plan: Plan, store: Store, streamed: list[int]
    ) -> dict[int, Callable[[Any, Layout], HostExperts]]:
        """Return what makes the experts that the host computes, by the number of their layer."""
        if not plan.storage.host_experts:
            return {}
        placed, rest = choice.place(plan), {"dtype": getattr(torch, plan.dtype), "share": plan.storage.host_experts}
        return {
            index: partial(HostExperts, slabs=experts_in(store.slab(number), placed[index].streamed), **rest)
            for index, number in _away(placed, streamed)
        }

    def record(self, model: Any, cache: Any) -> None:
        """Record the operations of decode steps, if the model allows it."""
        if can_record(model, cache):
            self._recorded = RecordedSteps(model, cache, [*self._experts, *([self._own] if self._own else [])])

    def ways(self) -> list[AbstractContextManager[None]]:
        return [self._few.always(False), self._few.always(True)]

    def counts(self) -> Routed | None:
        if not self._experts:
            return None
        calls, used = self._counts.total()
        return Routed(
            layers=calls,
            experts=used,
            copied=self._pool.copied if self._pool else 0,
            copied_bytes=self._pool.copied_bytes if self._pool else 0,
            on_host=self._counts.on_host,
            on_host_bytes=self._counts.on_host_bytes,
            read=self._cache.read if self._cache else 0,
            read_bytes=self._cache.read_bytes if self._cache else 0,
            own_bytes=self._own.brought_bytes if self._own else 0,
        )

    def give_up(self) -> list[torch.Tensor]:
        """Return the buffers of experts that may be lost; they are copied again when they are needed.

        All buffers may have other addresses afterwards, which recorded steps would not know.
        """
        if self._recorded is not None:
            self._recorded.forget()
        if self._pool is None:
            return []
        self._pool.forget()
        return [self._pool.slabs]


def _away(placed: Sequence[LayerPlacement], streamed: list[int]) -> list[tuple[int, int]]:
    """Return the layers whose experts do not stay on the device: their numbers, and those of their slabs in the store."""
    return [(index, number) for number, index in enumerate(streamed) if placed[index].streamed.experts]
