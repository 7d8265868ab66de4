"""Slabs come to the device in the order of the layers, ahead of them, and from the last on to the first again."""

from typing import Any, Protocol

import torch

from zi_experiments.engines.stream.store import Store


class Source(Protocol):
    """What a layer gets its slab from."""

    def take(self, index: int) -> Any:
        """The slab of the next layer, a uint8 tensor on the device; `index` is that layer's among the streamed ones."""

    def hand_back(self) -> None:
        """What has been launched is the last that reads that slab."""


class InPlace:
    """On a CPU a layer computes from its slab where it is."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._computed = 0  # slabs, ever

    def take(self, index: int) -> Any:
        _check_turn(index, self._computed % len(self._store.sizes))
        return self._store.take(index)

    def hand_back(self) -> None:
        self._store.hand_back(self._computed % len(self._store.sizes), None)
        self._computed += 1


class Ring:
    """Slots on the device, filled by a stream of its own.

    Two events a slot keep order, and the host waits for neither: `arrived`, the slab is there and a layer may compute;
    `left`, the layer has computed and the next slab may come. The n-th slab to come, counted over all passes, goes to slot
    n modulo slots; so while the last token is chosen, the first layers of the next pass are already on their way.
    With several ranks each brings its share over its own link, and they gather the slab between them.
    """

    def __init__(self, store: Store, slots: int, device: torch.device, group: Any) -> None:
        self._store, self._group = store, group
        ranks = group.size() if group is not None else 1
        self._sizes = [ranks * size for size in store.sizes]
        self._slots = [torch.empty(max(self._sizes), dtype=torch.uint8, device=device) for _ in range(slots)]
        on_gpu = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        events = [torch.cuda.Event() for _ in range(2 * slots * on_gpu)]  # type: ignore[no-untyped-call]
        self._arrived, self._left = events[:slots], events[slots:]
        self._sent = self._computed = 0  # slabs, ever
        self._send()

    def take(self, index: int) -> Any:
        _check_turn(index, self._computed % len(self._sizes))
        self._send(at_least=self._computed + 1)
        slot = self._computed % len(self._slots)
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_event(self._arrived[slot])
        return self._slots[slot][: self._sizes[index]]

    def hand_back(self) -> None:
        if self._side is not None:
            self._left[self._computed % len(self._slots)].record(torch.cuda.current_stream(self._side.device))
        self._computed += 1
        self._send()

    def _send(self, at_least: int = 0) -> None:
        """Launch the copies of all slabs that have a free slot and are in host memory, and of the first `at_least` ever."""
        while self._sent < self._computed + len(self._slots):
            index = self._sent % len(self._sizes)
            # ranks gather in step, so none of them looks at how far its own disk is
            if self._sent >= at_least and self._group is None and not self._store.is_ready(index):
                return
            self._copy(index, self._sent % len(self._slots))
            self._sent += 1

    def _copy(self, index: int, slot: int) -> None:
        share, there = self._store.take(index), self._slots[slot][: self._sizes[index]]
        with torch.cuda.stream(self._side):
            if self._side is not None:
                self._side.wait_event(self._left[slot])
            if self._group is None:
                there.copy_(share, non_blocking=True)
            else:
                mine = there[self._group.rank() * len(share) :][: len(share)]
                mine.copy_(share, non_blocking=True)
                torch.distributed.all_gather_into_tensor(there, mine, group=self._group)
            if self._side is not None:
                self._arrived[slot].record(self._side)
        self._store.hand_back(index, self._side)


def _check_turn(index: int, turn: int) -> None:
    if index != turn:
        raise RuntimeError(f"streamed layer {index} runs instead of layer {turn}: they have to run one after the other")
