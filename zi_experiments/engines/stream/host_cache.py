"""Experts of all layers in host memory, in front of the disk: those that tokens are routed to are read, and some stay."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import torch

from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines.stream import routing
from zi_experiments.engines.stream.expert_pool import Group, OfLayer, Source, arriving_parts
from zi_experiments.engines.stream.placement import choice, room
from zi_experiments.engines.stream.slots import Needed, Slots
from zi_experiments.engines.stream.store import Store
from zi_experiments.runtime.pinned_memory import host_empty


@dataclass(frozen=True, kw_only=True, slots=True)
class OnDisk:
    """Where the experts of one layer are on disk."""

    slab: int  # its number in the store
    start: int  # of the first expert, in bytes of the slab
    nbytes: int  # of an expert
    count: int


class HostCache:
    """Slots in host memory: a `Supply` of a pool on the GPU; a CPU computes from them.

    All reads of a layer begin at once. A slot is filled as soon as what was launched on its content is done. If it `saves`,
    an expert that is copied to the GPU makes room, and comes back when it leaves the GPU: it is in one of both.
    """

    def __init__(self, layers: list[OnDisk], slabs: torch.Tensor, at_once: int, *, saves: bool = False) -> None:
        """`slabs` has the slots, uint8 of shape (slots, bytes); groups have at most `at_once` experts, no more than slots."""
        self._layers, self.at_once, self.saves = layers, at_once, saves
        self.slabs = slabs
        self._store: Store | None = None
        self.sizes = [layer.nbytes for layer in layers]
        self._slots = Slots(len(layers), len(slabs))
        self._reads: dict[int, list[Future[None]]] = {}  # by slot: requests that nobody has seen succeed
        self._left: dict[int, Callable[[], None]] = {}  # by slot: waits for what still uses or fills it on the GPU
        self._needed: Needed = set()  # experts that are taken next
        self.read = self.read_bytes = 0  # experts so far, and their bytes

    def fill(self, slab: int, content: torch.Tensor) -> None:
        """Keep a layer's share of the experts in a slab, given by its number, while the model is loaded."""
        for layer, place in enumerate(self._layers):
            if place.slab == slab:
                experts = content[place.start :][: place.count * place.nbytes].view(place.count, -1)
                for expert in range(min(place.count, self._slots.share)):
                    slot, _ = self._slots.place(layer, expert, set())
                    self.slabs[slot, : place.nbytes].copy_(experts[expert])

    def attach(self, store: Store) -> None:
        """Set where experts are read from."""
        self._store = store

    def kept(self, slab: int) -> list[tuple[int, torch.Tensor]]:
        """Return what is here of a slab: pairs of the first byte in it and the bytes, in ascending order."""
        for left in self._left.values():
            left()
        self._left = {}
        return [
            (place.start + expert * place.nbytes, self.slabs[slot, : place.nbytes])
            for layer, place in enumerate(self._layers)
            if place.slab == slab
            for expert, slot in sorted(self._slots.of(layer).items())
            if slot not in self._reads
        ]

    def source(self, layer: int) -> Source:
        return OfLayer(self, layer)

    def missing(self, layer: int, experts: list[int]) -> list[int]:
        return self._slots.missing(layer, experts)

    def bring(self, layer: int, experts: list[int]) -> Iterator[Group]:
        """Yield groups of a layer's experts in host memory as they arrive."""
        self.prepare(layer, experts)
        for first in range(0, len(experts), self.at_once):
            chunk = experts[first : first + self.at_once]
            self.prepare(layer, chunk)
            for part in arriving_parts(self, layer, chunk):
                for expert in part:
                    self.take(layer, expert)
                rows = [self._slots.of(layer)[expert] for expert in part]
                yield Group(experts=part, slabs=self.slabs[:, : self.sizes[layer]], rows=rows)
                for expert in part:
                    self.hand_back(layer, expert, None)

    def prepare(self, layer: int, experts: list[int]) -> None:
        """Begin to read what is not here of a layer's `experts`, as far as there are slots."""
        first = experts[: self._slots.count]
        needed = {(layer, expert) for expert in first}
        if not needed <= self._needed:  # else some of those that were prepared together
            self._needed = needed
        for expert in self._slots.missing(layer, first):
            slot, _ = self._slots.place(layer, expert, self._needed)
            self._reads[slot] = self._read(layer, expert, slot)

    def is_ready(self, layer: int, expert: int) -> bool:
        slot = self._slots.of(layer).get(expert)
        return slot is not None and all(part.done() for part in self._reads.get(slot, ()))

    def take(self, layer: int, expert: int) -> torch.Tensor:
        if expert not in self._slots.of(layer):  # more were prepared than there are slots
            self.prepare(layer, [expert])
        slot = self._slots.of(layer)[expert]
        for part in self._reads.get(slot, ()):
            part.result()  # raises in every later pass too: the slot does not have what it should
        self._reads.pop(slot, None)
        return self.slabs[slot, : self.sizes[layer]]

    def hand_back(self, layer: int, expert: int, stream: Any) -> None:
        if stream is not None:
            self._left[self._slots.of(layer)[expert]] = stream.record_event().synchronize
        self._needed.discard((layer, expert))
        if self.saves:
            self._slots.release(layer, expert)

    def save(self, layer: int, expert: int, slab: torch.Tensor, stream: Any) -> None:
        if expert in self._slots.of(layer) or not self._slots.has_room(self._needed):
            return
        slot, _ = self._slots.place(layer, expert, self._needed)
        wait(self._reads.pop(slot, ()))  # of a pass that was broken off
        self.slabs[slot, : len(slab)].copy_(slab, non_blocking=True)
        if stream is not None:
            self._left[slot] = stream.record_event().synchronize

    def _read(self, layer: int, expert: int, slot: int) -> list[Future[None]]:
        place = self._layers[layer]
        earlier, left = self._reads.get(slot, ()), self._left.pop(slot, lambda: None)

        def after() -> None:
            wait(earlier)
            left()

        self.read += 1
        self.read_bytes += place.nbytes
        assert self._store is not None
        part = self.slabs[slot, : place.nbytes]
        return self._store.read_part(place.slab, place.start + expert * place.nbytes, part, after)


def planned(plan: Plan) -> HostCache | None:
    """Return the empty cache of a plan; None if it has none."""
    placed = choice.place(plan)
    streamed = [layer.streamed for layer in placed if layer.streamed.nbytes]
    if not (slots := room.host_slots(plan, placed)):
        return None
    places = [
        OnDisk(slab=slab, start=part.own_bytes, nbytes=part.experts.each.nbytes, count=part.experts.count)
        for slab, part in enumerate(streamed)
        if part.experts
    ]
    slot_bytes = routing.slot_bytes(streamed)
    saves = room.expert_slots(plan, placed) > 0 and slots > routing.least_slots(plan)
    memory = host_empty(slots * slot_bytes, torch.uint8, pinned=plan.pin_memory)
    return HostCache(places, memory.view(slots, slot_bytes), routing.at_once(plan, slot_bytes), saves=saves)
