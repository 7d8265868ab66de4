"""Slabs are copied to the device in the order of the layers, ahead of the compute; after the last comes the first."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Protocol

import torch

from zi_experiments.engines.stream.store import Store


class Source(Protocol):
    """Where a layer gets its slab from."""

    def take(self, index: int, *, is_step: bool = False) -> Any:
        """Return the slab of the next layer, uint8 on the device; `index` counts the streamed layers only.

        In a decode step, layers that the host computes take none.
        """

    def hand_back(self) -> None:
        """Release the slab taken last: operations launched later do not read it."""


class Feed(Protocol):
    """Where a ring gets slabs, or shares of them, from: `Store` or `Shares`."""

    sizes: list[int]  # bytes of each

    def is_ready(self, index: int) -> bool:
        """Return whether `take` would not wait."""

    def take(self, index: int) -> Any:
        """Return the next one's bytes. Operations launched on the current stream may read them."""

    def hand_back(self, index: int, stream: Any) -> None:
        """Release the one taken last, once all operations launched on `stream` are done."""


class Schedule:
    """The order of slabs, counted over all passes: long passes take all of them, decode steps may take fewer.

    It is known ahead, since decode steps follow. When another pass begins, it is known from there on.
    """

    def __init__(self, count: int, in_steps: Sequence[int] | None) -> None:
        self._all = tuple(range(count))
        self._in_steps = self._all if in_steps is None else tuple(in_steps)
        self._begun = 0  # number of the first slab of the current pass
        self._order: tuple[int, ...] = ()
        self._following = self._all  # the order of passes after the current one, as expected

    @property
    def end(self) -> int:
        """Number of the first slab after the current pass."""
        return self._begun + len(self._order)

    def index(self, number: int) -> int:
        """Return which slab comes as the `number`-th, from the current pass on."""
        if number < self.end:
            return self._order[number - self._begun]
        return self._following[(number - self.end) % len(self._following)]

    def begin(self, *, is_step: bool) -> None:
        """Begin the pass after the current one."""
        self._begun, self._order = self.end, self._in_steps if is_step else self._all
        self._following = self._in_steps or self._all

    def check(self, number: int, index: int) -> None:
        """Raise `RuntimeError` if the `number`-th slab is not `index`."""
        if index != (turn := self.index(number)):
            raise RuntimeError(
                f"streamed layer {index} runs instead of layer {turn}: they have to run one after the other"
            )


class InPlace:
    """On a CPU: a layer computes from its slab in the store."""

    def __init__(self, store: Store, in_steps: Sequence[int] | None = None) -> None:
        """`in_steps` has the slabs that a decode step takes; None: all."""
        self._store = store
        self._schedule = Schedule(len(store.sizes), in_steps)
        self._computed = 0  # slabs so far, over all passes

    def take(self, index: int, *, is_step: bool = False) -> Any:
        if self._computed == self._schedule.end:
            self._schedule.begin(is_step=is_step)
        self._schedule.check(self._computed, index)
        return self._store.take(index)

    def hand_back(self) -> None:
        self._store.hand_back(self._schedule.index(self._computed), None)
        self._computed += 1


class Ring:
    """Slots on the device, filled by a CUDA stream of its own.

    Two events per slot keep the order, and the host waits for neither: `arrived`, the slab is there and its layer may
    compute; `left`, the layer has computed and the next slab may come. The n-th slab, counted over all passes, goes to
    slot n modulo slots. So the first layers of the next pass come while the last token is being chosen; if another pass
    begins than was expected, what does not belong to it is copied over.
    Unless it `wraps`, it waits for the next pass to begin: another pass may come first, which does not use it.
    With a `group` of ranks the feed has this rank's share of each slab, and an all-gather makes the slab complete.
    """

    def __init__(
        self,
        feed: Feed,
        slots: int,
        device: torch.device,
        *,
        group: Any = None,
        wraps: bool = True,
        in_steps: Sequence[int] | None = None,
    ) -> None:
        """`in_steps` has the slabs that a decode step takes; None: all."""
        self._feed, self._group, self._wraps = feed, group, wraps
        self._schedule = Schedule(len(feed.sizes), in_steps)
        ranks = group.size() if group is not None else 1
        self.sizes = [ranks * size for size in feed.sizes]
        self._slots = [torch.empty(max(self.sizes), dtype=torch.uint8, device=device) for _ in range(slots)]
        on_gpu = device.type == "cuda"
        # a gather is a kernel, and all links wait for it: it goes before the products
        urgent = -1 if group is not None else 0
        self._side = torch.cuda.Stream(device, priority=urgent) if on_gpu else None  # type: ignore[no-untyped-call]
        events = [torch.cuda.Event() for _ in range(2 * slots * on_gpu)]  # type: ignore[no-untyped-call]
        self._arrived, self._left = events[:slots], events[slots:]
        self._sent = self._computed = 0  # slabs so far, over all passes
        self._send()

    def take(self, index: int, *, is_step: bool = False) -> Any:
        if self._computed == self._schedule.end:
            self._begin(is_step)
        self._schedule.check(self._computed, index)
        self._send(at_least=self._computed + 1)
        slot = self._computed % len(self._slots)
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_event(self._arrived[slot])
        return self._slots[slot][: self.sizes[index]]

    def hand_back(self) -> None:
        if self._side is not None:
            self._left[self._computed % len(self._slots)].record(torch.cuda.current_stream(self._side.device))
        self._computed += 1
        self._send()

    def _begin(self, is_step: bool) -> None:
        """Begin a pass: of the slabs sent ahead, those are kept that come in this order."""
        ahead = range(self._computed, self._sent)
        expected = {number: self._schedule.index(number) for number in ahead}
        self._schedule.begin(is_step=is_step)
        right = takewhile(lambda number: self._schedule.index(number) == expected[number], ahead)
        self._sent = self._computed + sum(1 for _ in right)

    def _send(self, at_least: int = 0) -> None:
        """Launch what fills the free slots, as far as the feed is ready, and the first `at_least` slabs anyway."""
        end = self._computed + len(self._slots)
        if not self._wraps:
            end = min(end, self._schedule.end)
        while self._sent < end:
            index = self._schedule.index(self._sent)
            if self._sent >= at_least and not self._feed.is_ready(index):
                return
            self._fill(index, self._sent % len(self._slots))
            self._sent += 1

    def _fill(self, index: int, slot: int) -> None:
        target = self._slots[slot][: self.sizes[index]]
        with torch.cuda.stream(self._side):
            if self._side is not None:
                self._side.wait_event(self._left[slot])
            source = self._feed.take(index)
            if self._group is None:
                target.copy_(source, non_blocking=True)
            else:
                torch.distributed.all_gather_into_tensor(target, source, group=self._group)
            if self._side is not None:
                self._arrived[slot].record(self._side)
            self._feed.hand_back(index, self._side)


class Shares:
    """This rank's share of every slab, on the device: the feed of a ring that gathers.

    A ring of its own brings them over this rank's PCIe connection, so copies go on while slabs are gathered.
    """

    def __init__(self, store: Store, slots: int, device: torch.device) -> None:
        self._ring = Ring(store, slots, device)
        self.sizes = self._ring.sizes

    def is_ready(self, index: int) -> bool:
        return True  # ranks gather in step, so none of them stops here because its own disk is behind

    def take(self, index: int) -> Any:
        return self._ring.take(index)

    def hand_back(self, index: int, stream: Any) -> None:
        self._ring.hand_back()
