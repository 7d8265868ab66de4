"""How long a plan will take, from what was measured on its machine. Pure; docs/limits.md has the formulas."""

from dataclasses import dataclass
from itertools import pairwise
from math import exp, log
from statistics import harmonic_mean
from typing import TypeVar

from zi_experiments.config.schema import CacheDevice, Calibration, WeightSource
from zi_experiments.cost_model.plan import Plan
from zi_experiments.cost_model.spec import ELEMENT_BYTES

APPENDED = 2  # the KV cache is read and written to append to it
CACHE_LAUNCH = 0.5  # of a layer of plain transformers, to move its KV cache between host memory and the GPU
CPU_MADE_S = 5e-9  # for one thread of a processor to make a random weight
CPU_QUANTIZED_S = 3e-9  # for a processor to quantize one
CPU_TRAFFIC = 0.35  # of the rate of a copy that element-wise operations of a processor reach
EXPANDED_BYTES = 2.5  # of memory traffic for each INT4 weight that is expanded to 16 bits


_Figure = TypeVar("_Figure")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a plan will take on a machine that was measured; None where a rate is not known that it depends on."""

    load_s: float | None
    prefill_s: float | None
    decode_step_s: float | None
    prefill_limited_by: str | None
    limited_by: str | None  # what a decode step spends most on: "link", "disk", "hbm", "gemm" or "launch"
    total_tok_per_s: float | None  # generated tokens over prefill and decode


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pass:
    """One forward pass of all sequences: each brings some tokens, and finds others in the cache."""

    tokens: int
    cached: int


class _Unknown(Exception):  # noqa: N818 - no error: what depends on it is not predicted
    """A rate is not known."""


def predict(plan: Plan) -> Prediction:
    """The times of a plan, with the copies and launches of its engine."""
    work = plan.run.workload
    # the KV cache grows by a token in each step: the middle one counts
    prefill_s, prefill_limited_by = _timed(plan, _Pass(tokens=work.prompt_len, cached=0))
    step_s, limited_by = _timed(plan, _Pass(tokens=1, cached=work.prompt_len + work.gen_len // 2))
    return Prediction(
        load_s=_load_s(plan),
        prefill_s=prefill_s,
        decode_step_s=step_s,
        prefill_limited_by=prefill_limited_by,
        limited_by=limited_by,
        total_tok_per_s=total_tok_per_s(plan, prefill_s, step_s),
    )


def total_tok_per_s(plan: Plan, prefill_s: float | None, decode_step_s: float | None) -> float | None:
    """Generated tokens over prefill and decode; None where either time is not known."""
    work = plan.run.workload
    if prefill_s is None or decode_step_s is None:
        return None
    return work.sequences * work.gen_len / (prefill_s + (work.gen_len - 1) * decode_step_s)


def _timed(plan: Plan, one: _Pass) -> tuple[float, str] | tuple[None, None]:
    """How long a pass takes, and what most of it is spent on."""
    try:
        seconds = _pass_s(plan, one)
        return _duration(plan, seconds), max(seconds, key=lambda name: seconds[name])
    except _Unknown:
        return None, None


def _duration(plan: Plan, seconds: dict[str, float]) -> float:
    """Partial overlap: the longer of copies and computing, and what of the shorter the engine does not hide behind it."""
    overlap = plan.storage.overlap
    copies = max(seconds["link"], seconds["disk"])
    # a GPU computes while its host launches what comes next; a CPU does one after the other
    work, launch = seconds["gemm"] + seconds["hbm"], seconds["launch"]
    computing = max(work, launch) if plan.machine.device == "cuda" else work + launch
    stalled = overlap.stall * plan.architecture.num_layers * _known(_measured(plan).layer_s)
    return max(copies, computing) + (1 - overlap.hidden) * min(copies, computing) + stalled


def _pass_s(plan: Plan, one: _Pass) -> dict[str, float]:
    """Seconds of each kind of work in a pass, if nothing else were to be done."""
    known, ranks = _measured(plan), plan.run.hardware.num_gpus
    pinned = _typical(plan, "link_bytes_per_s")
    link = pinned if plan.pin_memory else known.link_pageable_bytes_per_s
    weights_s = _over(plan.streamed_bytes_per_pass / ranks, link)
    cache_s = _over(_cache_bytes_on_link(plan, one) / ranks, pinned)
    passes = plan.architecture.num_layers * plan.run.workload.micro_batches
    launches = plan.storage.overlap.launch + (CACHE_LAUNCH if _moves_cache(plan) else 0)
    return {
        "link": weights_s + cache_s,
        "disk": _over(plan.placement.nvme_bytes, _typical(plan, "disk_bytes_per_s")),
        "gemm": _gemm_s(plan, one),
        "hbm": _traffic_s(plan, one),
        "launch": _known(known.layer_s) * launches * passes + _known(known.step_s),
    }


def _cache_bytes_on_link(plan: Plan, one: _Pass) -> int:
    """Bytes of the KV cache that come to the GPU, for which weights have to wait; those that go back take the other way."""
    if not _moves_cache(plan):
        return 0
    return ELEMENT_BYTES * plan.run.workload.sequences * plan.architecture.kv_elements(one.cached)


def _moves_cache(plan: Plan) -> bool:
    return plan.run.kv_cache.device is CacheDevice.cpu and plan.machine.device == "cuda"


def _gemm_s(plan: Plan, one: _Pass) -> float:
    """Products with all weights that tokens meet, and attention over a prompt."""
    work, arch = plan.run.workload, plan.architecture
    sequences = work.batch_size / plan.run.hardware.num_gpus  # of a micro-batch, on each device
    tokens, routed = sequences * one.tokens, plan.routed_experts
    dense = sum(p.numel for p in arch.parameters if p.layer is not None and len(p.shape) > 1 and not p.is_experts)
    seconds = _product_s(plan, dense, tokens)
    for p in arch.parameters:
        if p.layer is not None and p.is_experts:
            # tokens spread over the experts, and each of those that are met is read whole
            met = min(p.shape[0], tokens * routed)
            seconds += _product_s(plan, p.numel / p.shape[0] * met, max(1.0, tokens * routed / met))
    vocabulary = arch.config.get_text_config().vocab_size
    seconds += _product_s(plan, vocabulary * arch.hidden_size, sequences)  # of the last token alone
    if one.tokens > 1:
        attention = 2 * sequences * one.tokens**2 * arch.hidden_size * arch.num_layers
        seconds += _over(attention, _measured(plan).attention_flops or _rate(plan, tokens))
    return work.micro_batches * seconds


def _product_s(plan: Plan, elements: float, rows: float) -> float:
    """Of `rows` rows with matrices of so many elements."""
    return _over(2 * elements * rows, _rate(plan, rows))


def _rate(plan: Plan, rows: float) -> float:
    """Operations per second of a product of so many rows."""
    curve = _measured(plan).gemm_flops.get(plan.dtype)
    return _interpolate(_known(curve or None), rows)


def _interpolate(curve: dict[int, float], rows: float) -> float:
    """Between the measured points both axes are logarithmic; fewer rows take as long as the fewest, more are as fast."""
    points = sorted(curve.items())
    (fewest, slowest), (most, fastest) = points[0], points[-1]
    if rows <= fewest:
        return slowest * rows / fewest
    if rows >= most:
        return fastest
    (below, low), (above, high) = next(pair for pair in pairwise(points) if rows <= pair[1][0])
    share = log(rows / below) / log(above / below)
    return exp(log(low) + share * log(high / low))


def _traffic_s(plan: Plan, one: _Pass) -> float:
    """What moves in the device's memory beside the products: activations, KV cache, weights that are expanded."""
    arch, work, ranks = plan.architecture, plan.run.workload, plan.run.hardware.num_gpus
    # a layer reads or writes its residual stream about a dozen times, and what is inside of its feed-forward part four
    activations = work.sequences / ranks * one.tokens * arch.num_layers * (14 * arch.hidden_size + 4 * plan.widest)
    cache = work.sequences / ranks * arch.kv_elements(one.cached + one.tokens)
    rate = _known(_typical(plan, "hbm_bytes_per_s"))
    share = CPU_TRAFFIC if plan.machine.device == "cpu" else 1.0
    moved_s = _over(ELEMENT_BYTES * (activations + APPENDED * cache), share * rate)
    # over a prompt, attention is arithmetic
    attended_s = _over(ELEMENT_BYTES * cache, _measured(plan).cache_bytes_per_s or rate) if one.tokens == 1 else 0.0
    copied_s = _over(2 * plan.storage.overlap.copies * plan.weight_bytes, rate)
    return moved_s + attended_s + copied_s + _expanding_s(plan)


def _expanding_s(plan: Plan) -> float:
    """Quantized weights of the layers become 16-bit ones in every pass."""
    known = _measured(plan)
    elements = sum(p.numel for p in plan.architecture.parameters if plan.is_quantized(p) and p.layer is not None)
    if known.expand_elements_per_s:
        seconds = elements / known.expand_elements_per_s
    else:
        seconds = _over(EXPANDED_BYTES * elements, _typical(plan, "hbm_bytes_per_s"))
    return plan.storage.overlap.expand * seconds


def _load_s(plan: Plan) -> float | None:
    """Random weights made, quantized, and put where they stay; a checkpoint is read meanwhile."""
    overlap, known = plan.storage.overlap, plan.machine.calibration
    if known is None:
        return None
    pinned = known.pin_bytes_per_s and overlap.pinning * known.pin_bytes_per_s
    filled = pinned if plan.pin_memory else known.host_bytes_per_s
    each_s, quantized_s = overlap.load_s_per_parameter, overlap.load_s_per_quantized
    if plan.machine.device == "cpu":
        quantized_s += CPU_QUANTIZED_S
        if plan.run.weights.source is WeightSource.random:
            each_s += CPU_MADE_S
    made_s = (each_s + quantized_s * plan.quantized_fraction) * plan.architecture.num_parameters
    try:
        host_s = _over(plan.placement.cpu_bytes + plan.storage.host_buffer_bytes, filled)
        return overlap.load_s + made_s + host_s + _over(plan.placement.nvme_bytes, known.disk_write_bytes_per_s)
    except _Unknown:
        return None


def _typical(plan: Plan, name: str) -> float | None:
    """The mean over the moments that a ceiling is the best of; the ceiling where it was measured once, or typed."""
    moments = (_measured(plan).moments or {}).get(name)
    ceiling: float | None = getattr(plan.machine.ceilings, name)
    return harmonic_mean(moments) if moments else ceiling


def _measured(plan: Plan) -> Calibration:
    return _known(plan.machine.calibration)


def _over(amount: float, rate: float | None) -> float:
    return amount / _known(rate) if amount else 0.0


def _known(figure: _Figure | None) -> _Figure:
    if figure is None:
        raise _Unknown
    return figure
