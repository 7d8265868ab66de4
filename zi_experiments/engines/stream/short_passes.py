"""Passes of few tokens, such as decode steps: routed experts only, packed products, operations recorded once."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines.base import Routed
from zi_experiments.engines.stream import placement, routing
from zi_experiments.engines.stream.expert_pool import InPlace, Pool
from zi_experiments.engines.stream.few_tokens import FewTokens
from zi_experiments.engines.stream.layers import StreamedLayer
from zi_experiments.engines.stream.recorded import RecordedSteps, can_record
from zi_experiments.engines.stream.slab import experts_in
from zi_experiments.engines.stream.store import Store


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
        sources = self._sources(plan, layers, store, streamed, device) if stored.routes else {}
        made = [layer.shorten(self._few, sources.get(index)) for index, layer in enumerate(layers)]
        self._experts = [experts for experts in made if experts is not None]

    def _sources(
        self, plan: Plan, layers: list[StreamedLayer], store: Store, streamed: list[int], device: torch.device
    ) -> dict[int, Any]:
        """Return where each layer's experts come from, by its number; some models begin with layers without experts."""
        placed = placement.place(plan)
        parts = [(index, placed[index].streamed, number) for number, index in enumerate(streamed)]
        away = {index: experts_in(store.slab(number), part) for index, part, number in parts if part.experts}
        here = {index: slabs for index, layer in enumerate(layers) if (slabs := layer.resident_experts()) is not None}
        if not (slots := placement.expert_slots(plan, placed)):
            return {index: InPlace(slabs) for index, slabs in (away | here).items()}
        at_once = routing.at_once(plan, routing.slot_bytes([layer.streamed for layer in placed]))
        pool = self._pool = Pool(list(away.values()), slots, at_once, device)
        pooled = {index: pool.source(number) for number, index in enumerate(away)}
        return pooled | {index: InPlace(slabs) for index, slabs in here.items()}

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
        )

    def give_up(self) -> list[torch.Tensor]:
        """Return the buffers of experts that may be lost; they are copied again when they are needed."""
        if self._pool is None:
            return []
        self._pool.forget()
        return [self._pool.slabs]
