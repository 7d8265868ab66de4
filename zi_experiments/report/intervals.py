"""How sure a ratio of two runs is: a bootstrap over their passes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from zi_experiments.report.runs import Passes, Run

ENOUGH_PASSES = 5  # fewer give a bootstrap too few different samples to draw
_RESAMPLES = 2000
_BLOCK = 100  # of them at a time, for the memory that they take
_LEVEL = 0.95

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Where the ratio of a figure of two runs, after / before, lies."""

    low: float
    high: float
    is_range: bool  # of the passes, which are too few for a bootstrap; otherwise 95 % of the bootstrap

    @property
    def differs(self) -> bool | None:
        """Whether the ratio is another than 1 by more than noise; None with too few passes to say."""
        return None if self.is_range else not self.low <= 1 <= self.high


@dataclass(frozen=True, kw_only=True, slots=True)
class _Statistic:
    """A figure as a percentile of times, or of one over them, up to a factor that all passes of a run share."""

    times: Callable[[Passes], list[Any]]  # one for each pass, or a list of as many for each pass
    percent: int = 50
    is_rate: bool = False

    def of(self, times: Array, chosen: np.ndarray[Any, np.dtype[np.int64]]) -> Array:
        """The figure of each set of passes; `chosen` has their numbers, of shape (sets, passes)."""
        values = 1 / times if self.is_rate else times
        blocks = [chosen[start : start + _BLOCK] for start in range(0, len(chosen), _BLOCK)]
        found = [np.percentile(values[block].reshape(len(block), -1), self.percent, axis=1) for block in blocks]
        return np.concatenate(found)


_ttft, _total, _steps = (lambda p: p.ttft_s), (lambda p: p.total_s), (lambda p: p.step_s)
_STATISTICS = {
    "prefill_tok_per_s": _Statistic(times=_ttft, is_rate=True),
    "decode_tok_per_s": _Statistic(times=lambda passes: [sum(steps) for steps in passes.step_s], is_rate=True),
    "total_tok_per_s": _Statistic(times=_total, is_rate=True),
    "ttft_s": _Statistic(times=_ttft),
    "tpot_p50_s": _Statistic(times=_steps),
    "tpot_p90_s": _Statistic(times=_steps, percent=90),
    "tpot_p99_s": _Statistic(times=_steps, percent=99),
    "tok_per_s_per_user": _Statistic(times=_steps, is_rate=True),
    "link_bytes_per_s": _Statistic(times=_steps, is_rate=True),
    "disk_bytes_per_s": _Statistic(times=_steps, is_rate=True),
    "fraction_of_bound": _Statistic(times=_steps, is_rate=True),
    "prefill_fraction_of_bound": _Statistic(times=_ttft, is_rate=True),
    "decode_prediction_error": _Statistic(times=_steps, is_rate=True),
    "prefill_prediction_error": _Statistic(times=_ttft, is_rate=True),
    "cost_per_million_tokens": _Statistic(times=_total),
}


def of_ratio(name: str, before: Run, after: Run, ratio: float) -> Interval | None:
    """Where the ratio of a figure, after / before, lies; None for a figure with one value for each run."""
    statistic = _STATISTICS.get(name)
    if statistic is None:
        return None
    times = [_array(statistic.times(run.passes)) for run in (before, after)]
    counts = [len(each) for each in times]
    if min(counts) == 0:
        return _by_spread(name, before, after)
    whole = [statistic.of(each, np.arange(len(each))[None, :])[0] for each in times]
    factor = ratio / float(whole[1] / whole[0])  # of what the runs do not share: sequences, tokens, bytes
    if min(counts) < ENOUGH_PASSES:
        single = [statistic.of(each, np.arange(len(each))[:, None]) for each in times]
        return _range(single, factor) if max(counts) > 1 else None
    random = np.random.default_rng(0)  # the same records give the same interval
    drawn = [statistic.of(each, random.integers(len(each), size=(_RESAMPLES, len(each)))) for each in times]
    outside = (1 - _LEVEL) / 2
    low, high = np.quantile(factor * drawn[1] / drawn[0], [outside, 1 - outside])
    return Interval(low=float(low), high=float(high), is_range=False)


def _by_spread(name: str, before: Run, after: Run) -> Interval | None:
    """The range where records have the smallest and the largest pass of a rate, and not all of them."""
    ends = [_array([run.row.get(f"{name}_{end}") for end in ("min", "max")]) for run in (before, after)]
    if any(len(each) == 0 for each in ends) or all(each[0] == each[1] for each in ends):
        return None
    return _range(ends, 1.0)


def _range(of_passes: list[Array], factor: float) -> Interval:
    before, after = of_passes
    low, high = factor * after.min() / before.max(), factor * after.max() / before.min()
    return Interval(low=float(low), high=float(high), is_range=True)


def _array(times: list[Any]) -> Array:
    """The times as an array; empty where there is not one above zero for each step of each pass."""
    try:
        values = np.array(times, dtype=np.float64)
    except (TypeError, ValueError):  # passes of different lengths
        return np.array([])
    return values if values.size and bool(np.all(values > 0)) else np.array([])
