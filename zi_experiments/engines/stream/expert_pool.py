"""Experts of all layers on the device: those that tokens are routed to are copied from host memory, and some stay."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from zi_experiments.engines.stream import routing
from zi_experiments.engines.stream.slots import Needed, Slots


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Experts that are on the device, ready for operations that are launched now."""

    experts: list[int]
    slabs: torch.Tensor  # uint8 of shape (slabs, bytes of an expert)
    rows: list[int]  # of `slabs`: where each of `experts` is


class Source(Protocol):
    """Where the experts of one layer come from."""

    @property
    def slabs(self) -> torch.Tensor:
        """`slabs` of all groups: uint8 of shape (slabs, bytes of an expert)."""

    @property
    def has_all(self) -> bool:
        """Whether row n of `slabs` is always expert n."""

    @property
    def at_once(self) -> int:
        """So many experts, or fewer, stay valid until the next are asked for."""

    def missing(self, experts: list[int]) -> list[int]:
        """Return those of the layer's `experts` that are not on the device."""

    def bring(self, experts: list[int]) -> Iterator[Group]:
        """Yield groups of the layer's `experts`; each is valid until the next one is asked for."""


class InPlace:
    """Experts that are computed from where they are stored."""

    has_all = True

    def __init__(self, slabs: torch.Tensor, *, streamed: bool = False) -> None:
        """`streamed`: a CPU computes what a GPU would have to copy."""
        self.slabs, self.at_once, self._streamed = slabs, len(slabs), streamed

    def missing(self, experts: list[int]) -> list[int]:
        return experts if self._streamed else []

    def bring(self, experts: list[int]) -> Iterator[Group]:
        yield Group(experts=experts, slabs=self.slabs, rows=experts)


class Supply(Protocol):
    """Host memory that a pool copies from; layers are counted from the first one with experts."""

    @property
    def sizes(self) -> list[int]:
        """The bytes of an expert, of each layer."""

    @property
    def saves(self) -> bool:
        """Whether experts that leave the device have to be saved."""

    def prepare(self, layer: int, experts: list[int]) -> None:
        """Begin to fetch what is not in host memory of a layer's `experts`, which are taken next."""

    def is_ready(self, layer: int, expert: int) -> bool:
        """Return whether `take` would not wait."""

    def take(self, layer: int, expert: int) -> torch.Tensor:
        """Return an expert's bytes. Until `hand_back`, nothing else is written there."""

    def hand_back(self, layer: int, expert: int, stream: Any) -> None:
        """Release an expert, once all operations launched on `stream` are done; None: now."""

    def save(self, layer: int, expert: int, slab: torch.Tensor, stream: Any) -> None:
        """Launch on `stream` what keeps an expert that leaves the device, where `slab` has its bytes."""


def arriving_parts(supply: Supply, layer: int, experts: list[int]) -> Iterator[list[int]]:
    """Yield a layer's experts as they arrive: at a time those that are ready, else the next one."""
    while experts:
        part = [expert for expert in experts if supply.is_ready(layer, expert)] or experts[:1]
        experts = [expert for expert in experts if expert not in part]
        yield part


class InHostMemory:
    """A supply of experts that all stay in host memory."""

    saves = False

    def __init__(self, layers: list[torch.Tensor]) -> None:
        """`layers` has the experts of each layer, of shape (experts, bytes)."""
        self._layers = layers
        self.sizes = [layer.shape[1] for layer in layers]

    def prepare(self, layer: int, experts: list[int]) -> None:
        pass

    def is_ready(self, layer: int, expert: int) -> bool:
        return True

    def take(self, layer: int, expert: int) -> torch.Tensor:
        return self._layers[layer][expert]

    def hand_back(self, layer: int, expert: int, stream: Any) -> None:
        pass

    def save(self, layer: int, expert: int, slab: torch.Tensor, stream: Any) -> None:
        pass

    def source(self, layer: int) -> Source:
        """Return a source for a CPU, which computes from here."""
        return InPlace(self._layers[layer], streamed=True)


class Pool:
    """Slots on the device. Copies run on a CUDA stream of their own, ordered by events."""

    def __init__(self, supply: Supply, slots: int, at_once: int, device: torch.device) -> None:
        """Groups have at most `at_once` experts, no more than `slots`."""
        self._supply, self.at_once, self.sizes = supply, at_once, supply.sizes
        self.slabs = torch.empty(slots, max(supply.sizes), dtype=torch.uint8, device=device)
        self._side: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._slots = Slots(len(supply.sizes), slots)
        self._left: dict[int, Any] = {}  # by slot: when its last operation is done
        self.copied = self.copied_bytes = 0  # experts so far, and their bytes

    def forget(self) -> None:
        """Empty all slots: their content may be lost."""
        self._slots.forget()
        self._left = {}

    def source(self, layer: int) -> Source:
        return OfLayer(self, layer)

    def missing(self, layer: int, experts: list[int]) -> list[int]:
        return self._slots.missing(layer, experts)

    def bring(self, layer: int, experts: list[int]) -> Iterator[Group]:
        """Yield groups of a layer's experts: first those that are there, then the others as they arrive."""
        # all at once: a disk should not wait while a part of them is computed
        self._supply.prepare(layer, self._slots.missing(layer, experts))
        for first in range(0, len(experts), self.at_once):
            yield from self._bring(layer, experts[first : first + self.at_once])

    def _bring(self, layer: int, experts: list[int]) -> Iterator[Group]:
        needed = {(layer, expert) for expert in experts}
        missing = self._slots.missing(layer, experts)
        self._supply.prepare(layer, missing)
        ready = [expert for expert in missing if self._supply.is_ready(layer, expert)]
        together = routing.together(self._supply.sizes[layer])
        parts = [ready[first : first + together] for first in range(0, len(ready), together)]
        arriving = [(part, self._copy(layer, part, needed)) for part in parts]
        if there := [expert for expert in experts if expert not in missing]:
            yield self._group(layer, there, None)
        for part, arrived in arriving:
            yield self._group(layer, part, arrived)
        for part in arriving_parts(self._supply, layer, [expert for expert in missing if expert not in ready]):
            yield self._group(layer, part, self._copy(layer, part, needed))
        self._slots.missing(layer, experts)  # none: what is used counts in this order, whatever arrived first
        if self._side is not None:
            left = torch.cuda.current_stream(self.slabs.device).record_event()
            self._left |= {self._slots.of(layer)[expert]: left for expert in experts}

    def _group(self, layer: int, experts: list[int], arrived: Any) -> Group:
        if arrived is not None:
            torch.cuda.current_stream(self.slabs.device).wait_event(arrived)
        slots = self._slots.of(layer)
        return Group(
            experts=experts,
            slabs=self.slabs[:, : self._supply.sizes[layer]],
            rows=[slots[expert] for expert in experts],
        )

    def _copy(self, layer: int, experts: list[int], needed: Needed) -> Any:
        """Launch the copies of `experts` to slots of others than those `needed` now. Return the event of their arrival."""
        with torch.cuda.stream(self._side):
            for expert in experts:
                slab = self._supply.take(layer, expert)
                slot, gone = self._slots.place(layer, expert, needed)
                if self._side is not None and slot in self._left:
                    self._side.wait_event(self._left[slot])
                if gone and self._supply.saves:
                    self._supply.save(*gone, self.slabs[slot, : self._supply.sizes[gone[0]]], self._side)
                self.slabs[slot, : len(slab)].copy_(slab, non_blocking=True)
                self._supply.hand_back(layer, expert, self._side)
                self.copied += 1
                self.copied_bytes += slab.nbytes
            return self._side.record_event() if self._side is not None else None


@dataclass(frozen=True, slots=True)
class OfLayer:
    """The experts of one layer of a pool or cache."""

    all_layers: Any  # has `missing(layer, experts)`, `bring(layer, experts)`, `slabs`, `sizes` and `at_once`
    layer: int
    has_all: bool = False

    @property
    def slabs(self) -> torch.Tensor:
        slabs: torch.Tensor = self.all_layers.slabs[:, : self.all_layers.sizes[self.layer]]
        return slabs

    @property
    def at_once(self) -> int:
        at_once: int = self.all_layers.at_once
        return at_once

    def missing(self, experts: list[int]) -> list[int]:
        missing: list[int] = self.all_layers.missing(self.layer, experts)
        return missing

    def bring(self, experts: list[int]) -> Iterator[Group]:
        groups: Iterator[Group] = self.all_layers.bring(self.layer, experts)
        return groups
