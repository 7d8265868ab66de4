"""Experts of all layers on the device: those that tokens are routed to are copied from host memory, and some stay."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from zi_experiments.engines.stream.routing import COPIED_TOGETHER


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Experts that are on the device, ready for operations that are launched now."""

    experts: list[int]
    slabs: torch.Tensor  # uint8 of shape (slabs, bytes of an expert)
    rows: list[int]  # of `slabs`: where each of `experts` is


class Source(Protocol):
    """Where the experts of one layer come from."""

    def bring(self, experts: list[int]) -> Iterator[Group]:
        """Yield groups of the layer's `experts`; each is valid until the next one is asked for."""


class InPlace:
    """Experts that are computed from where they are stored."""

    def __init__(self, slabs: torch.Tensor) -> None:
        self._slabs = slabs

    def bring(self, experts: list[int]) -> Iterator[Group]:
        yield Group(experts=experts, slabs=self._slabs, rows=experts)


class Pool:
    """Slots on the device, each with one expert of any layer.

    A layer that holds its share of the slots replaces its own least recently used expert. Replacing the least recently
    used of all would keep nothing in a pool smaller than what a token needs: the layers take turns.
    Copies run on a CUDA stream of their own, ordered by events.
    """

    def __init__(self, layers: list[torch.Tensor], slots: int, at_once: int, device: torch.device) -> None:
        """`layers` has the experts of each layer in host memory, of shape (experts, bytes); groups have at most `at_once`."""
        self._layers, self._at_once = layers, at_once
        self.slabs = torch.empty(slots, max(layer.shape[1] for layer in layers), dtype=torch.uint8, device=device)
        self._side: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._share = slots // len(layers)
        self.copied = self.copied_bytes = 0  # experts so far, and their bytes
        self.forget()

    def forget(self) -> None:
        """Empty all slots: their content may be lost."""
        self._held = [OrderedDict[int, int]() for _ in self._layers]  # by layer: slots by expert, the latest use last
        self._free = list(range(len(self.slabs)))
        self._left: dict[int, Any] = {}  # by slot: when its last operation is done

    def source(self, layer: int) -> Source:
        return _OfLayer(self, layer)

    def bring(self, layer: int, experts: list[int]) -> Iterator[Group]:
        """Yield groups of a layer's experts: first those that are there, then the others as they arrive."""
        for first in range(0, len(experts), self._at_once):
            yield from self._bring(layer, experts[first : first + self._at_once])

    def _bring(self, layer: int, experts: list[int]) -> Iterator[Group]:
        held, size = self._held[layer], self._layers[layer].shape[1]
        there = [expert for expert in experts if expert in held]
        for expert in there:
            held.move_to_end(expert)
        missing, together = [expert for expert in experts if expert not in held], -(-COPIED_TOGETHER // size)
        parts = [missing[first : first + together] for first in range(0, len(missing), together)]
        arriving = [(part, self._copy(layer, part, set(experts))) for part in parts]
        for group, arrived in ([(there, None)] if there else []) + arriving:
            if arrived is not None:
                torch.cuda.current_stream(self.slabs.device).wait_event(arrived)
            yield Group(experts=group, slabs=self.slabs[:, :size], rows=[held[expert] for expert in group])
        if self._side is not None:
            left = torch.cuda.current_stream(self.slabs.device).record_event()
            self._left |= {held[expert]: left for expert in experts}

    def _copy(self, layer: int, experts: list[int], needed: set[int]) -> Any:
        """Launch the copies of `experts` to slots of others than those `needed` now. Return the event of their arrival."""
        with torch.cuda.stream(self._side):
            for expert in experts:
                slot = self._free.pop() if self._free else self._replaced(layer, needed)
                if self._side is not None and slot in self._left:
                    self._side.wait_event(self._left[slot])
                slab = self._layers[layer][expert]
                self.slabs[slot, : len(slab)].copy_(slab, non_blocking=True)
                self._held[layer][expert] = slot
                self.copied += 1
                self.copied_bytes += slab.nbytes
            return self._side.record_event() if self._side is not None else None

    def _replaced(self, layer: int, needed: set[int]) -> int:
        """Return a slot, empty now: of the layer itself if it holds its share, else of the layer that holds most."""
        own = self._held[layer]
        old = next((expert for expert in own if expert not in needed), None) if len(own) >= self._share else None
        if old is not None:
            return own.pop(old)
        others = (held for held in self._held if held is not own)
        return max(others, key=len).popitem(last=False)[1]


@dataclass(frozen=True, slots=True)
class _OfLayer:
    pool: Pool
    layer: int

    def bring(self, experts: list[int]) -> Iterator[Group]:
        return self.pool.bring(self.layer, experts)
