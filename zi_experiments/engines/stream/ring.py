"""Slabs are copied to the device in the order of the layers, ahead of the compute; after the last comes the first."""

from typing import Any, Protocol

import torch

from zi_experiments.engines.stream.store import Store


class Source(Protocol):
    """Where a layer gets its slab from."""

    def take(self, index: int) -> Any:
        """Return the slab of the next layer, uint8 on the device; `index` counts the streamed layers only."""

    def hand_back(self) -> None:
        """Release the slab taken last: operations launched later do not read it."""


class InPlace:
    """On a CPU: a layer computes from its slab in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._computed = 0  # slabs so far, over all passes

    def take(self, index: int) -> Any:
        _check_turn(index, self._computed % len(self._store.sizes))
        return self._store.take(index)

    def hand_back(self) -> None:
        self._store.hand_back(self._computed % len(self._store.sizes), None)
        self._computed += 1


class Ring:
    """Slots on the device, filled by a CUDA stream of its own.

    Two events per slot keep the order, and the host waits for neither: `arrived`, the slab is there and its layer may
    compute; `left`, the layer has computed and the next slab may be copied. The n-th slab, counted over all passes,
    goes to slot n modulo slots. So the first layers of the next pass are copied while the last token is being chosen.
    Unless it `wraps`, it waits for the next pass to begin: another pass may come first, which does not use it.
    With several ranks each copies its share over its own PCIe connection, and an all-gather makes the slab complete.
    """

    def __init__(self, store: Store, slots: int, device: torch.device, group: Any, *, wraps: bool = True) -> None:
        self._store, self._group, self._wraps = store, group, wraps
        ranks = group.size() if group is not None else 1
        self._sizes = [ranks * size for size in store.sizes]
        self._slots = [torch.empty(max(self._sizes), dtype=torch.uint8, device=device) for _ in range(slots)]
        on_gpu = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        events = [torch.cuda.Event() for _ in range(2 * slots * on_gpu)]  # type: ignore[no-untyped-call]
        self._arrived, self._left = events[:slots], events[slots:]
        self._sent = self._computed = 0  # slabs so far, over all passes
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
        """Launch the copies of all slabs with a free slot that are in host memory, and the first `at_least` anyway."""
        count, begun = len(self._sizes), max(at_least, self._computed)
        end = self._computed + len(self._slots)
        if not self._wraps:
            end = min(end, -(-begun // count) * count)
        while self._sent < end:
            index = self._sent % len(self._sizes)
            # ranks gather in step, so none of them stops here because its own disk is behind
            if self._sent >= at_least and self._group is None and not self._store.is_ready(index):
                return
            self._copy(index, self._sent % len(self._slots))
            self._sent += 1

    def _copy(self, index: int, slot: int) -> None:
        share, target = self._store.take(index), self._slots[slot][: self._sizes[index]]
        with torch.cuda.stream(self._side):
            if self._side is not None:
                self._side.wait_event(self._left[slot])
            if self._group is None:
                target.copy_(share, non_blocking=True)
            else:
                own = target[self._group.rank() * len(share) :][: len(share)]
                own.copy_(share, non_blocking=True)
                torch.distributed.all_gather_into_tensor(target, own, group=self._group)
            if self._side is not None:
                self._arrived[slot].record(self._side)
        self._store.hand_back(index, self._side)


def _check_turn(index: int, turn: int) -> None:
    if index != turn:
        raise RuntimeError(f"streamed layer {index} runs instead of layer {turn}: they have to run one after the other")
