"""Passes of few tokens, such as decode steps: routed experts only, packed products, operations recorded once."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines.base import Routed
from zi_experiments.engines.stream import placement, routing
from zi_experiments.engines.stream.expert_pool import InHostMemory, InPlace, Pool, Source
from zi_experiments.engines.stream.few_tokens import FewTokens
from zi_experiments.engines.stream.host_cache import HostCache, OnDisk
from zi_experiments.engines.stream.layers import StreamedLayer
from zi_experiments.engines.stream.recorded import RecordedSteps, can_record
from zi_experiments.engines.stream.slab import experts_in
from zi_experiments.engines.stream.store import Store
from zi_experiments.runtime.pinned_memory import host_empty


class ShortPasses:
    """How a loaded model computes passes of few tokens, as its plan says."""

    def __init__(
        self, plan: Plan, layers: list[StreamedLayer], store: Store, streamed: list[int], device: torch.device
    ) -> None:
        """`streamed` has the numbers of the layers that `store` has slabs of, in its order."""
        stored = plan.storage
        self._few = FewTokens(
            routed=routing.most_tokens(plan) if stored.routes else 0,
            # other roundings in front of a router would choose other experts
            packed=0 if plan.experts else stored.packed_tokens,
            packed_experts=stored.packed_tokens,
        )
        self._pool: Pool | None = None
        self._cache: HostCache | None = None
        sources: dict[int, Source] = {}
        if stored.routes:
            here = {
                index: slabs for index, layer in enumerate(layers) if (slabs := layer.resident_experts()) is not None
            }
            sources = {index: InPlace(slabs) for index, slabs in here.items()}
            sources |= self._away(plan, store, streamed, device)
        made = [layer.shorten(self._few, sources.get(index)) for index, layer in enumerate(layers)]
        self._experts = [experts for experts in made if experts is not None]

    def _away(self, plan: Plan, store: Store, streamed: list[int], device: torch.device) -> dict[int, Source]:
        """Return where experts come from that do not stay on the device, by the number of their layer.

        Some models begin with layers without experts.
        """
        placed = placement.place(plan)
        parts = [(index, number, placed[index].streamed) for number, index in enumerate(streamed)]
        stacks = [(number, part, part.experts.each.nbytes) for _, number, part in parts if part.experts]
        layers = [index for index, _, part in parts if part.experts]
        slot_bytes = routing.slot_bytes([part for _, part, _ in stacks])
        at_once = routing.at_once(plan, slot_bytes) if stacks else 0
        slabs = []
        if cached := placement.host_slots(plan, placed):
            room = host_empty(cached * slot_bytes, torch.uint8, pinned=plan.pin_memory)
            places = [OnDisk(slab=number, start=part.own_bytes, nbytes=nbytes) for number, part, nbytes in stacks]
            self._cache = HostCache(store, places, room.view(cached, -1), at_once)
        else:
            slabs = [experts_in(store.slab(number), part) for number, part, _ in stacks]
        if slots := placement.expert_slots(plan, placed):
            self._pool = Pool(self._cache or InHostMemory(slabs), slots, at_once, device)
        if shared := self._pool or self._cache:
            return {index: shared.source(number) for number, index in enumerate(layers)}
        return {index: InPlace(experts) for index, experts in zip(layers, slabs, strict=True)}

    def record(self, model: Any, cache: Any) -> None:
        """Record the operations of decode steps, if the model allows it."""
        if can_record(model, cache):
            RecordedSteps(model, cache, self._experts)

    def ways(self) -> list[AbstractContextManager[None]]:
        return [self._few.always(False), self._few.always(True)]

    def counts(self) -> Routed | None:
        if not self._experts:
            return None
        return Routed(
            layers=sum(each.calls for each in self._experts),
            experts=sum(each.used for each in self._experts),
            copied=self._pool.copied if self._pool else 0,
            copied_bytes=self._pool.copied_bytes if self._pool else 0,
            read=self._cache.read if self._cache else 0,
            read_bytes=self._cache.read_bytes if self._cache else 0,
        )

    def give_up(self) -> list[torch.Tensor]:
        """Return the buffers of experts that may be lost; they are copied again when they are needed."""
        if self._pool is None:
            return []
        self._pool.forget()
        return [self._pool.slabs]
