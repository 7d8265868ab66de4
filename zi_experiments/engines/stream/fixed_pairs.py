"""Pairs of tokens and experts, as many for every choice of a router: operations on them can be recorded."""

from collections.abc import Callable, Iterator

import torch

from zi_experiments.engines.stream.expert_pool import Group

TOKENS, ROWS, TARGETS = 0, 1, 3  # what the host fills in
NONE = 1 << 40  # a row of no slab


class Counts:
    """What the layers with experts have done so far. Operations that are recorded count on the device."""

    def __init__(self, device: torch.device) -> None:
        self.calls = self.used = 0  # calls; distinct experts, summed over them
        self.on_host = self.on_host_bytes = 0  # of these, the ones that the host has computed, and their bytes
        self._on_device = torch.zeros(2, dtype=torch.long, device=device)

    def add(self, counted: torch.Tensor) -> None:
        """Add to both what is on the device."""
        self._on_device += counted

    def total(self) -> tuple[int, int]:
        """Return calls and distinct experts; waits for the device."""
        calls, used = self._on_device.tolist()
        return self.calls + calls, self.used + used


class FixedPairs:
    """For each pair its token, its row of the slabs, its number in its part, and its target: for the host, and on the device.

    The host reads the router's choice, and fills in where the experts are, in the order in which they arrive. The device
    copies that from pinned memory. The host has waited for the device when it fills in the next choice.
    """

    def __init__(self, shape: torch.Size, together: int, device: torch.device) -> None:
        """`shape` is (tokens, experts of each); a part has `together` pairs, the last one what is left."""
        self.shape, (tokens, each), self._together = shape, shape, together
        order, pinned = torch.arange(tokens * each), device.type == "cuda"
        numbers = torch.stack([order // each, order, order % together, order])
        self._host = numbers.pin_memory() if pinned else numbers.clone()
        self._written = self._host.numpy()  # the same memory
        self._seen = torch.empty(tokens * each, dtype=torch.long, pin_memory=pinned)
        self._numbers = numbers.to(device)
        self._one_call = torch.tensor([1, each], device=device)
        self._chosen: list[int] = []
        self._groups: Iterator[Group] = iter(())
        self._filled = 0

    def counted(self, index: torch.Tensor, experts: int) -> torch.Tensor:
        """Return the number of calls, which is 1, and that of the distinct experts of a choice, of so many."""
        if len(index) == 1:
            return self._one_call  # all of a token's differ
        distinct = (index.flatten()[:, None] == torch.arange(experts, device=index.device)).any(0).sum()
        return torch.stack([self._one_call[0], distinct])

    def of_all(self, index: torch.Tensor) -> torch.Tensor:
        """Return all pairs, of shape (4, pairs), for slabs that have all experts in their order."""
        self._numbers[ROWS] = index.flatten()
        return self._numbers

    def parts(self) -> Iterator[slice]:
        pairs = len(self._seen)
        return (slice(first, min(first + self._together, pairs)) for first in range(0, pairs, self._together))

    def read(self, index: torch.Tensor) -> None:
        """Let the device copy the choice to the host."""
        self._seen.copy_(index.flatten(), non_blocking=True)

    def fill(self, part: slice, bring: Callable[[list[int]], Iterator[Group]]) -> None:
        """Fill in the pairs of the first part or the next. What is launched then, waits until their experts are there."""
        if part.start == 0:
            if self._numbers.is_cuda:
                torch.cuda.current_stream(self._numbers.device).synchronize()  # for the choice
            self._chosen, self._filled = self._seen.tolist(), 0
            self._groups = bring(self._chosen)
        host = self._written
        while self._filled < part.stop and (group := next(self._groups, None)):
            rows = dict(zip(group.experts, group.rows, strict=True))
            pairs = [pair for pair, expert in enumerate(self._chosen) if expert in rows]
            there = slice(self._filled, self._filled + len(pairs))
            host[TARGETS, there] = pairs
            host[TOKENS, there] = [pair // self.shape[1] for pair in pairs]
            host[ROWS, there] = [rows[self._chosen[pair]] for pair in pairs]
            self._filled = there.stop
        host[ROWS, self._filled : part.stop] = NONE

    def on_device(self, part: slice) -> torch.Tensor:
        """Return the pairs of a part, of shape (4, pairs), once they are filled in."""
        self._numbers.copy_(self._host, non_blocking=True)
        return self._numbers[:, part]
