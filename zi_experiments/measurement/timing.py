"""Run a workload on a session and keep raw, synchronised times. Nothing is derived here."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from zi_experiments.engines.base import Routed, Session
from zi_experiments.runtime.energy import Reading
from zi_experiments.runtime.progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """Times of one `generate` call, in seconds on the host clock, and the energy around it."""

    ttft_s: float  # from the call to the first token being known on the host
    total_s: float  # from the call to the last token being known on the host
    step_s: list[float]  # from one token to the next: G − 1 values
    routed: Routed | None = None  # what the decode steps did, if they bring routed experts only
    # by counter: readings before the ranks wait for each other, and after the last token; None: it cannot be read
    joules: dict[str, tuple[float, float] | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """All times and energies measured in one run."""

    load_s: float
    warmup: list[Pass]
    measured: list[Pass]
    ranks: list[list[Pass]] = field(default_factory=list)  # the measured passes of each rank; none with one rank

    def to_dict(self) -> dict[str, Any]:
        return {
            "load_s": self.load_s,
            "ttft_s": [one.ttft_s for one in self.measured],
            "total_s": [one.total_s for one in self.measured],
            "step_s": [one.step_s for one in self.measured],
            "routed": [asdict(one.routed) if one.routed else None for one in self.measured],
            "joules": [one.joules for one in self.measured],
            "warmup": [asdict(one) for one in self.warmup],
            "ranks": [
                {
                    "ttft_s": [one.ttft_s for one in passes],
                    "total_s": [one.total_s for one in passes],
                    "step_s": [one.step_s for one in passes],
                }
                for passes in self.ranks
            ],
        }


def of_ranks(samples: list[Samples]) -> Samples:
    """Return the samples of a run from those of its ranks. Of each pass the times of the rank that took longest count.

    Counters of energy that several machines name alike get the rank as well: `cpu:package-0@4`.
    """
    if len(samples) == 1:
        return samples[0]
    return Samples(
        load_s=max(one.load_s for one in samples),
        warmup=_slowest([one.warmup for one in samples]),
        measured=_slowest([one.measured for one in samples]),
        ranks=[one.measured for one in samples],
    )


def _slowest(ranks: list[list[Pass]]) -> list[Pass]:
    found = []
    for passes in zip(*ranks, strict=True):
        joules: dict[str, tuple[float, float] | None] = {}
        for rank, one in enumerate(passes):
            joules |= {f"{name}@{rank}" if name in joules else name: ends for name, ends in one.joules.items()}
        found.append(replace(max(passes, key=lambda one: one.total_s), joules=joules))
    return found


class _Clock:
    """A streamer that records when each token of a batch is known on the host.

    `generate` copies each token to the host on the compute stream, and only that stream is waited for: a device-wide
    synchronisation would stall the prefetch of weights.
    """

    def __init__(self, on_token: Callable[[], None]) -> None:
        self.times: list[float] = []
        self._on_token = on_token
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        now = time.perf_counter()
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(now)
        self._on_token()

    def end(self) -> None:
        pass


def measure_pass(
    session: Session,
    input_ids: Any,
    gen_len: int,
    progress: Progress,
    keep: Callable[[Any], None] = lambda tokens: None,
) -> Pass:
    """Return the times of one `generate` of `gen_len` tokens on `input_ids` of shape (sequences, prompt_len).

    `keep` gets the generated tokens, on the host, of shape (sequences, gen_len).
    """
    before = session.routed()

    def on_token() -> None:
        nonlocal before
        if len(clock.times) == 1:  # no operation of the first decode step has been launched
            before = session.routed()
        progress.advance()

    clock = _Clock(on_token)
    began = time.perf_counter()
    tokens = session.generate(input_ids, gen_len, clock)
    assert tuple(tokens.shape) == (input_ids.shape[0], input_ids.shape[1] + gen_len), tokens.shape
    assert len(clock.times) == gen_len, len(clock.times)
    keep(tokens[:, input_ids.shape[1] :].cpu())
    times = clock.times
    return Pass(
        ttft_s=times[0] - began,
        total_s=times[-1] - began,
        step_s=[after - earlier for earlier, after in pairwise(times)],
        routed=routed.since(before) if (routed := session.routed()) and before else None,
    )


def measure_passes(
    session: Session,
    input_ids: Any,
    gen_len: int,
    *,
    count: int,
    phase: str,
    progress: Progress,
    before_each: Callable[[], None],
    joules: Callable[[], Reading],
    keep: Callable[[Any], None],
) -> list[Pass]:
    """Return the times of `count` passes; call `before_each` (a barrier) before each, and `keep` with its tokens.

    The counters of `joules` are read before that barrier, and after the last token.
    """
    if not count:
        return []
    progress.begin(phase, count * gen_len, "tokens")
    passes = []
    for _ in range(count):
        before = joules()
        before_each()
        one = measure_pass(session, input_ids, gen_len, progress, keep)
        passes.append(replace(one, joules=_around(before, joules())))
    progress.end()
    return passes


def _around(before: Reading, after: Reading) -> dict[str, tuple[float, float] | None]:
    """Return both readings of each counter; None for one that could not be read."""
    pairs = {name: (before[name], value) for name, value in after.items()}
    return {name: None if low is None or high is None else (low, high) for name, (low, high) in pairs.items()}
