"""Slots with one expert each, of any layer: which expert is in which slot, and which one makes room for another."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator

Needed = set[tuple[int, int]]  # pairs of layer and expert


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

    def release(self, layer: int, expert: int) -> None:
        """Empty the slot of an expert."""
        self._free.append(self._held[layer].pop(expert))

    def has_room(self, needed: Needed) -> bool:
        """Return whether any slot may be replaced."""
        held = ((layer, expert) for layer, slots in enumerate(self._held) for expert in slots)
        return bool(self._free) or any(pair not in needed for pair in held)

    def place(self, layer: int, expert: int, needed: Needed) -> tuple[int, tuple[int, int] | None]:
        """Return a slot for an expert, now its own, and whose it was: not that of a (layer, expert) `needed` now."""
        slot, gone = (self._free.pop(), None) if self._free else self._replaced(layer, needed)
        self._held[layer][expert] = slot
        return slot, gone

    def _replaced(self, layer: int, needed: Needed) -> tuple[int, tuple[int, int]]:
        """Return a slot, empty now: of the layer itself if it holds its share, else of the layer that holds most."""
        for other in self._in_turn(layer):
            for expert in self._held[other]:
                if (other, expert) not in needed:
                    return self._held[other].pop(expert), (other, expert)
        raise RuntimeError("all slots are needed")

    def _in_turn(self, layer: int) -> Iterator[int]:
        """Yield the layers that may give a slot, the first choice first: seldom more than two."""
        if len(self._held[layer]) >= self.share:
            yield layer
        sizes = list(map(len, self._held))
        sizes[layer] = -1
        yield sizes.index(max(sizes))
        yield from sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
