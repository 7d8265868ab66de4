"""Slots with one expert each, of any layer: which expert is in which slot, and which one makes room for another."""

from collections import OrderedDict
from collections.abc import Iterable


class Slots:
    """The least recently used expert makes room, of the same layer once that holds its share of the slots.

    Replacing the least recently used of all layers would keep nothing in slots for less than what a token needs: the
    layers take turns.
    """

    def __init__(self, layers: int, count: int) -> None:
        self.count, self.share = count, count // layers
        self._held = [OrderedDict[int, int]() for _ in range(layers)]  # slots by expert, the latest use last
        self._free = list(range(count))

    def forget(self) -> None:
        """Empty all slots."""
        for held in self._held:
            held.clear()
        self._free = list(range(self.count))

    def of(self, layer: int) -> dict[int, int]:
        """Return the slots of a layer's experts, by expert."""
        return self._held[layer]

    def missing(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Return those of a layer's `experts` that are in no slot; the others are used now."""
        held, found = self._held[layer], []
        for expert in experts:
            if expert in held:
                held.move_to_end(expert)
            else:
                found.append(expert)
        return found

    def place(self, layer: int, expert: int, needed: set[int]) -> int:
        """Return a slot for an expert, now its own; it is that of none of the layer's experts `needed` now."""
        slot = self._free.pop() if self._free else self._replaced(layer, needed)
        self._held[layer][expert] = slot
        return slot

    def _replaced(self, layer: int, needed: set[int]) -> int:
        """Return a slot, empty now: of the layer itself if it holds its share, else of the layer that holds most."""
        own = self._held[layer]
        old = next((expert for expert in own if expert not in needed), None) if len(own) >= self.share else None
        if old is not None:
            return own.pop(old)
        others = (held for held in self._held if held is not own)
        return max(others, key=len).popitem(last=False)[1]
