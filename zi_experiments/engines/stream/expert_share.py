"""Which of the experts that a layer lacks on the device the host computes. Figures only."""

from collections.abc import Sequence
from itertools import accumulate

from zi_experiments.config.schema import OffloadDevice
from zi_experiments.cost_model.spec import Spec
from zi_experiments.engines.stream import host_share, routing
from zi_experiments.engines.stream.slab import Layout


def obstacle(spec: Spec) -> str | None:
    """Return why the host computes no experts that are brought one by one, in words; None if it can."""
    if spec.run.offload.device is OffloadDevice.nvme:
        return "the host computes experts from host memory only, not from disk"
    if spec.experts_are_quantized and not _multiplies(spec):
        return "the host computes 16-bit experts, and INT4 in groups of 32 to 256 inputs that are not transposed"
    return None


def _multiplies(spec: Spec) -> bool:
    """Return whether the host's INT4 product supports the experts."""
    stacks = [p for p in spec.architecture.parameters if p.experts and spec.is_quantized(p)]
    return host_share.supports(spec.run.quant) and all(p.is_linear for p in stacks)


def asked(spec: Spec) -> float:
    """Return the share of the host in the work of experts that are not on the device, if they are brought one by one."""
    share = spec.run.offload.compute
    if not isinstance(share, float | int) or spec.run.offload.device is OffloadDevice.none or obstacle(spec):
        return 0.0
    return float(share)


def chosen(rows: Sequence[int], share: float) -> list[int]:
    """Return which of a layer's experts the host computes, so that it ends together with the copies of the others.

    Experts are given by the tokens of each, and returned by their places. With a `share` of 0.5, the host computes one of
    average tokens in the time of a copy. A copy takes equally long for all, and a product longer for more tokens, so the
    host has those with the fewest.
    """
    order, average = sorted(range(len(rows)), key=lambda at: rows[at]), sum(rows) / max(1, len(rows))
    work = accumulate((rows[at] / average for at in order), initial=0.0)
    ends = [max((1 - share) * host, share * (len(rows) - count)) for count, host in enumerate(work)]
    return order[: ends.index(min(ends))]  # of equal ones the first: what is copied may be used again


def part(spec: Spec, streamed: Sequence[Layout], share: float, slots: int) -> float:
    """Return the part of the experts that a decode step misses in so many slots which the host computes."""
    missed = max(1, round(routing.missed(spec, streamed, slots)))
    return len(chosen([1] * missed, share)) / missed
