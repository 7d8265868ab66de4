"""Weights that are not experts and do not stay on the device: in routed passes they cross alone, in a ring of their own."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines.stream.placement import choice, room
from zi_experiments.engines.stream.ring import InPlace, Ring, Source
from zi_experiments.engines.stream.store import Store
from zi_experiments.runtime.pinned_memory import host_empty


class OwnWeights:
    """Brings the first bytes of slabs, up to the experts, to one place on the device.

    The ring of whole slabs has others on their way in each kind of pass. This one has the same for every routed pass, so
    it goes on from one to the next, whatever comes between. A step can be recorded because the place is always the same.
    """

    def __init__(self, source: Source, sizes: Mapping[int, int], device: torch.device) -> None:
        """`sizes` are the bytes of each slab in the order of `source`, by its number among the streamed slabs."""
        self._source = source
        self._numbers = {slab: number for number, slab in enumerate(sizes)}
        self._place = torch.empty(max(sizes.values()), dtype=torch.uint8, device=device)
        self.brought_bytes = 0  # so far
        self.cut: Callable[[Callable[[], object]], None] | None = None

    def bring(self, slab: int) -> torch.Tensor:
        """Return a slab's bytes, for operations that are launched before the next call."""

        def copy() -> None:
            arrived = self._source.take(self._numbers[slab])
            self._place[: len(arrived)].copy_(arrived)
            self._source.hand_back()
            self.brought_bytes += len(arrived)

        if self.cut is None:
            copy()
        else:
            self.cut(copy)
        return self._place


def planned(plan: Plan, store: Store, device: torch.device) -> OwnWeights | None:
    """Return what brings these weights of a plan from its store; None if all of them stay on the device."""
    placed = choice.place(plan)
    if not (largest := room.own_slot_bytes(plan, placed)):
        return None
    streamed = [layer for layer in placed if layer.streamed.nbytes]
    sizes = {slab: part.streamed.own_bytes for slab, part in enumerate(streamed) if part.streamed.own_bytes}
    buffers = []
    if any(layer.on_disk for layer in streamed):
        make: Any = host_empty
        buffers = [make(largest, torch.uint8, pinned=plan.pin_memory) for _ in range(room.BUFFERS)]
    feed = store.prefixes(sizes, buffers)
    source = InPlace(feed) if device.type == "cpu" else Ring(feed, room.OWN_SLOTS, device)
    return OwnWeights(source, sizes, device)
