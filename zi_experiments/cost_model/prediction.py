"""Predict how long a plan takes, from rates measured on its machine. Pure; docs/limits.md has the formulas."""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import exp, log
from statistics import harmonic_mean
from typing import TypeVar

from zi_experiments.config.schema import CacheDevice, Calibration, WeightSource
from zi_experiments.cost_model.bound import step_bytes
from zi_experiments.cost_model.plan import Plan
from zi_experiments.cost_model.spec import ELEMENT_BYTES, drawn_evenly
from zi_experiments.models.architecture import Parameter
from zi_experiments.models.packing import Code

APPENDED = 2  # to append to the KV cache, it is read and written
CACHE_LAUNCH = 0.5  # overhead to move a layer's KV cache between host and GPU, as a share of a plain layer's launches
CPU_MADE_S = 5e-9  # for one CPU thread to create a random weight
CPU_QUANTIZED_S = 3e-9  # for a CPU to quantize a weight
CPU_TRAFFIC = 0.35  # share of a copy's rate that element-wise operations reach on a CPU
CROSSING_S = 5e-4  # for hidden states to go to the host and come back, beside copies of weights
EXPANDED_BYTES = 2.5  # memory traffic for each INT4 weight that is expanded to 16 bits
EXPANSION = {  # time to expand a weight of a checkpoint's format, as a multiple of that of an INT4 one; an H100, a Xeon
    "cuda": {Code.asymmetric: 1.0, Code.signed: 1.5, Code.e2m1: 1.2, Code.e4m3: 1.3},
    "cpu": {Code.asymmetric: 1.0, Code.signed: 0.9, Code.e2m1: 1.8, Code.e4m3: 2.0},
}


_Figure = TypeVar("_Figure")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Predicted times of a plan on a measured machine; None where a rate that they depend on is unknown."""

    load_s: float | None
    prefill_s: float | None
    decode_step_s: float | None
    decode_step_on_gpu_s: float | None  # if the host computed no layers or experts; the same where it computes none
    prefill_limited_by: str | None
    limited_by: str | None  # largest part of a decode step: "link", "disk", "hbm", "gemm", "launch", "host" or "memory"
    total_tok_per_s: float | None  # generated tokens over prefill and decode
    cost_per_million_tokens: float | None  # generated at that rate, at hardware.price_per_hour


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pass:
    """One forward pass of all sequences."""

    tokens: int  # new tokens of each sequence; one in a decode step
    cached: int  # tokens of each sequence that are in the KV cache


class _Unknown(Exception):  # noqa: N818 - not an error: what depends on the rate is not predicted
    """A rate is unknown."""


def predict(plan: Plan) -> Prediction:
    """Return the predicted times of a plan, including the copies and launch overhead of its engine."""
    work = plan.run.workload
    # the KV cache grows by a token in each step: take the middle one
    prefill_s, prefill_limited_by = _timed(plan, _Pass(tokens=work.prompt_len, cached=0))
    step = _Pass(tokens=1, cached=work.prompt_len + work.gen_len // 2)
    step_s, limited_by = _timed(plan, step)
    tok_per_s = total_tok_per_s(plan, prefill_s, step_s)
    return Prediction(
        load_s=_load_s(plan),
        prefill_s=prefill_s,
        decode_step_s=step_s,
        decode_step_on_gpu_s=_timed(_without_host(plan), step)[0] if plan.storage.uses_host else step_s,
        prefill_limited_by=prefill_limited_by,
        limited_by=limited_by,
        total_tok_per_s=tok_per_s,
        cost_per_million_tokens=cost_per_million_tokens(plan, tok_per_s),
    )


def _without_host(plan: Plan) -> Plan:
    """Return the plan with all layers and experts computed on the GPU."""
    stored = plan.storage
    step_bytes = None if stored.host_layers else stored.streamed_bytes_per_step
    if step_bytes is not None:
        step_bytes += stored.host_bytes_per_step
    gpu = replace(stored, host_layers=(), host_bytes_per_step=0, streamed_bytes_per_step=step_bytes)
    return replace(plan, storage=gpu)


def total_tok_per_s(plan: Plan, prefill_s: float | None, decode_step_s: float | None) -> float | None:
    """Return generated tokens per second over prefill and decode; None if either time is unknown."""
    work = plan.run.workload
    if prefill_s is None or decode_step_s is None:
        return None
    return work.sequences * work.gen_len / (prefill_s + (work.gen_len - 1) * decode_step_s)


def cost_per_million_tokens(plan: Plan, tok_per_s: float | None) -> float | None:
    """Return what all machines cost while they generate a million tokens, in the currency of the price; None if unknown."""
    price, machines = plan.run.hardware.price_per_hour, plan.run.launch.nnodes
    return machines * price / 3600 * 1e6 / tok_per_s if price is not None and tok_per_s else None


def _timed(plan: Plan, one: _Pass) -> tuple[float, str] | tuple[None, None]:
    """Return the seconds of a pass and its largest part; None if a rate is unknown."""
    try:
        found = _estimated(plan, one)
        if _is_recorded(plan, one):  # which takes no longer than launching operations one by one
            found = min(found, _estimated(replace(plan, storage=replace(plan.storage, recorded=False)), one))
        return found
    except _Unknown:
        return None, None


def _estimated(plan: Plan, one: _Pass) -> tuple[float, str]:
    seconds = _pass_s(plan, one)
    return _duration(plan, one, seconds), max(seconds, key=lambda name: seconds[name])


def _duration(plan: Plan, one: _Pass, seconds: dict[str, float]) -> float:
    """Return the seconds of a pass with partial overlap: the longer of copies and computing, and the rest of the shorter."""
    overlap = plan.storage.overlap
    copies = max(seconds["link"], seconds["disk"])
    # a GPU computes while the host launches the next kernels; a CPU does one after the other, and so does a recorded pass:
    # its small operations follow the others on the device, and where it needs a choice, host and device take turns
    work, launch = seconds["gemm"] + seconds["hbm"], seconds["launch"]
    overlaps = plan.machine.device == "cuda" and not _is_recorded(plan, one)
    computing = max(work, launch) if overlaps else work + launch
    stalled = 0.0 if _is_recorded(plan, one) else overlap.stall * plan.architecture.num_layers * _layer_s(plan)
    if _on_host(plan, one):
        return max(_beside_host(plan, seconds, copies, work), seconds["memory"])
    if one.tokens == 1 and plan.storage.host_bytes_per_step:
        copies = max(_beside_experts(plan, seconds, copies), seconds["memory"])
    shorter = min(copies, computing)
    hidden = overlap.hidden * shorter
    if _is_routed(plan, one):
        hidden = min(shorter, _hidden_s(plan, one) + _ahead_s(plan, seconds))
    return copies + computing - hidden + stalled


def _hidden_s(plan: Plan, one: _Pass) -> float:
    """Return the seconds of products with experts that run while others of their layer are copied."""
    missed = _missed(plan)
    # those that are copied last are computed when nothing is left to copy
    last = min(max(1.0, missed), plan.storage.experts_together) / plan.distinct_experts(plan.run.workload.sequences)
    experts = [p for p in plan.architecture.parameters if p.experts]
    return min(1.0, missed) * max(0.0, 1 - last) * (_expanding_s(plan, one, experts) + _products_s(plan, one, experts))


def _ahead_s(plan: Plan, seconds: dict[str, float]) -> float:
    """Return the seconds of a routed step's copies, or reads, that do not wait for a choice."""
    limit = max("link", "disk", key=lambda name: seconds[name])
    moved = plan.streamed_bytes_per_step if limit == "link" else plan.disk_bytes_per_step
    return seconds[limit] * plan.storage.own_bytes_per_step / moved if moved else 0.0


def _missed(plan: Plan) -> float:
    """Return how many experts a layer brings in a decode step; 0 if they are not brought one by one."""
    storage, moved = plan.storage, max(plan.streamed_bytes_per_step, plan.disk_bytes_per_step)
    experts_bytes = moved - storage.own_bytes_per_step
    return experts_bytes / storage.expert_bytes / plan.architecture.num_layers if storage.expert_bytes else 0.0


def _on_host(plan: Plan, one: _Pass) -> float:
    """Return the share of the layers that the host computes in a pass."""
    if one.tokens > 1 or plan.machine.device == "cpu":
        return 0.0
    return len(plan.storage.host_layers) / plan.architecture.num_layers


def _beside_host(plan: Plan, seconds: dict[str, float], copies: float, work: float) -> float:
    """Return the seconds of a step in which the host computes layers: they follow those of the GPU, and copies run beside.

    Operations of layers are launched meanwhile. The host and the link share its memory. When one of them has ended, the
    other goes on at its usual rate.
    """
    known, on_host = _measured(plan), plan.storage.host_layers
    layers = len(on_host) * plan.run.workload.micro_batches
    crossings = sum(index + 1 not in on_host for index in on_host)  # from the host to the GPU, and so many back
    computing = work + _known(known.step_s) + crossings * CROSSING_S
    serial = max(computing + seconds["host"], seconds["launch"])
    serial_beside = max(serial, computing + layers * (known.host_layer_busy_s or 0.0))
    copies_beside = _busy(plan, copies)
    if copies_beside > serial_beside:
        return serial_beside + (1 - serial_beside / copies_beside) * copies
    return copies_beside + (1 - copies_beside / serial_beside) * serial if serial_beside else 0.0


def _beside_experts(plan: Plan, seconds: dict[str, float], copies: float) -> float:
    """Return the seconds until both are done: copies of experts, and those that the host computes beside them."""
    host, busy = seconds["host"], _busy(plan, copies)
    return host + (1 - host / busy) * copies if busy > host else host


def _busy(plan: Plan, copies: float) -> float:
    """Return the seconds of copies while the host computes, since both read its memory."""
    link = _known(_typical(plan, "link_bytes_per_s"))
    return copies * max(1.0, link / (_measured(plan).link_busy_bytes_per_s or link))


def _is_routed(plan: Plan, one: _Pass) -> bool:
    """Return whether a pass brings only the experts that tokens are routed to."""
    return plan.storage.routes and one.tokens == 1


def _is_recorded(plan: Plan, one: _Pass) -> bool:
    return plan.storage.recorded and one.tokens == 1


def _reads_choice(plan: Plan, one: _Pass) -> bool:
    """Return whether the host reads which experts were chosen: not if all are on the device and are multiplied as packed."""
    in_place = plan.storage.cached_bytes == 0
    packed = all(_is_packed(plan, one, p) for p in plan.architecture.parameters if p.experts)
    return _is_routed(plan, one) and not (in_place and packed)


def _pass_s(plan: Plan, one: _Pass) -> dict[str, float]:
    """Return the seconds of each kind of work in a pass, each by itself."""
    known, ranks = _measured(plan), plan.run.hardware.num_gpus
    pinned = _typical(plan, "link_bytes_per_s")
    link = pinned if plan.pin_memory else known.link_pageable_bytes_per_s
    streamed, read = plan.streamed_bytes_per_pass, plan.disk_bytes_per_pass
    if one.tokens == 1:
        streamed, read = plan.streamed_bytes_per_step, plan.disk_bytes_per_step
    weights_s = _over(streamed / ranks, link)
    if _is_routed(plan, one):
        weights_s += plan.storage.overlap.copy_s * _missed(plan) * plan.architecture.num_layers
    cache_s = _over(plan.of_one_rank(_cache_bytes_on_link(plan, one)), pinned)
    # without links of their own, GPUs gather over PCIe, which brings the shares too
    is_over_network = plan.run.launch.nnodes > 1 and not plan.storage.each_machine_has_all
    gathered_s = _over(plan.storage.gathered_bytes, None if is_over_network else plan.machine.peer_bytes_per_s or link)
    if plan.machine.peer_bytes_per_s is None:
        gathered_s += weights_s + cache_s
    passes = plan.architecture.num_layers * plan.run.workload.micro_batches
    on_gpu = 1 - _on_host(plan, one)
    return {
        "link": max(weights_s + on_gpu * cache_s, gathered_s),
        "disk": _over(plan.of_one_machine(read), _typical(plan, "disk_bytes_per_s")),
        "gemm": on_gpu * _gemm_s(plan, one),
        "hbm": on_gpu * _traffic_s(plan, one),
        "launch": on_gpu * passes * _launch_s(plan, one) + _known(known.step_s),
        "host": _host_s(plan, one),
        "memory": _memory_s(plan, one),
    }


def _host_s(plan: Plan, one: _Pass) -> float:
    """Return the seconds of the layers, or of the experts, that the host's cores compute in a pass."""
    known, share = _measured(plan), _on_host(plan, one)
    if share:
        passes = plan.architecture.num_layers * plan.run.workload.micro_batches
        return share * passes * _known(known.host_layer_s)
    experts = plan.storage.host_bytes_per_step if one.tokens == 1 else 0
    return _over(experts, known.host_experts_bytes_per_s)


def _memory_s(plan: Plan, one: _Pass) -> float:
    """Return the seconds in which host memory gives what cores read, and what crosses beside that; 0 if not measured."""
    rate = _typical(plan, "host_memory_bytes_per_s")
    on_host = _on_host(plan, one) * step_bytes(plan) + (plan.storage.host_bytes_per_step if one.tokens == 1 else 0)
    return (on_host + plan.link_bytes_per_pass) / rate if on_host and rate else 0.0


def _launch_s(plan: Plan, one: _Pass) -> float:
    """Return the seconds of a layer in which operations are launched or, in a recorded pass, begin and end."""
    overlap, is_routed = plan.storage.overlap, _is_routed(plan, one)
    if _is_recorded(plan, one):
        small_s = overlap.small_s + (overlap.small_routed_s if is_routed else 0.0)
        choice = overlap.choice + overlap.fetch * min(1.0, _missed(plan))
        if plan.storage.host_bytes_per_step:
            choice += overlap.choice  # host and device take turns once more, for what the host has computed
        return small_s + (choice * _layer_s(plan) if _reads_choice(plan, one) else 0.0)
    launches = overlap.launch + (overlap.launch_routed if is_routed else 0.0)
    return _layer_s(plan) * (launches + (CACHE_LAUNCH if _moves_cache(plan) else 0))


def _layer_s(plan: Plan) -> float:
    return _known(_measured(plan).layer_s)


def _cache_bytes_on_link(plan: Plan, one: _Pass) -> int:
    """Return the bytes of KV cache copied to the GPU, which delay weights; copies back use the other direction of PCIe."""
    if not _moves_cache(plan):
        return 0
    return ELEMENT_BYTES * plan.run.workload.sequences * plan.architecture.kv_elements(one.cached)


def _moves_cache(plan: Plan) -> bool:
    return plan.run.kv_cache.device is CacheDevice.cpu and plan.machine.device == "cuda"


def _gemm_s(plan: Plan, one: _Pass) -> float:
    """Return the seconds of products with all weights that tokens use, and of attention over a prompt."""
    work, arch = plan.run.workload, plan.architecture
    sequences = plan.largest_share  # of a micro-batch, on the device that has most
    seconds = _products_s(plan, one, [p for p in arch.parameters if p.layer is not None and len(p.shape) > 1])
    vocabulary = arch.config.get_text_config().vocab_size
    seconds += _product_s(plan, vocabulary * arch.hidden_size, sequences)  # the head, for the last token only
    if one.tokens > 1:
        attention = 2 * sequences * one.tokens**2 * arch.hidden_size * arch.num_layers
        seconds += _over(attention, _measured(plan).attention_flops or _rate(plan, sequences * one.tokens))
    return work.micro_batches * seconds


def _products_s(plan: Plan, one: _Pass, parameters: list[Parameter]) -> float:
    """Return the seconds of a micro-batch's products with those weights that are not multiplied as packed."""
    tokens, routed = plan.largest_share * one.tokens, plan.routed_experts
    expanded = [p for p in parameters if not _is_packed(plan, one, p)]
    seconds = _product_s(plan, sum(p.numel for p in expanded if not p.is_experts), tokens)
    for p in expanded:
        if p.is_experts:
            # each expert that is used is read whole
            met = drawn_evenly(p.shape[0], min(routed, p.shape[0]), tokens)
            seconds += _product_s(plan, p.numel / p.shape[0] * met, max(1.0, tokens * routed / met))
    return seconds


def _product_s(plan: Plan, elements: float, rows: float) -> float:
    """Return the seconds of a product of `rows` rows with matrices of so many elements."""
    return _over(2 * elements * rows, _rate(plan, rows))


def _rate(plan: Plan, rows: float) -> float:
    """Return the operations per second of a product with so many rows."""
    curve = _measured(plan).gemm_flops.get(plan.dtype)
    return _interpolate(_known(curve or None), rows)


def _interpolate(curve: dict[int, float], rows: float) -> float:
    """Return the rate at `rows`: log-log between measured points; fewer rows take the time of the fewest, more their rate."""
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
    """Return the seconds of memory traffic beside products: activations, KV cache, copied and expanded weights."""
    arch, sequences = plan.architecture, plan.largest_share * plan.run.workload.micro_batches
    # a layer reads or writes its residual stream about 14 times, and the inner activations of its feed-forward part 4 times
    activations = sequences * one.tokens * arch.num_layers * (14 * arch.hidden_size + 4 * plan.widest)
    cache = sequences * arch.kv_elements(one.cached + one.tokens)
    rate = _known(_typical(plan, "hbm_bytes_per_s"))
    share = CPU_TRAFFIC if plan.machine.device == "cpu" else 1.0
    moved_s = _over(ELEMENT_BYTES * (activations + APPENDED * cache), share * rate)
    # over a prompt, attention counts as arithmetic
    attended_s = _over(ELEMENT_BYTES * cache, _measured(plan).cache_bytes_per_s or rate) if one.tokens == 1 else 0.0
    copied_s = _over(2 * plan.storage.overlap.copies * plan.weight_bytes, rate)
    layers = [p for p in arch.parameters if p.layer is not None]
    return moved_s + attended_s + copied_s + _expanding_s(plan, one, layers)


def _is_packed(plan: Plan, one: _Pass, parameter: Parameter) -> bool:
    """Return whether a weight is multiplied without being expanded: in a step of few tokens for each matrix."""
    few, sequences = plan.storage.packed_tokens, plan.run.workload.sequences
    if one.tokens > 1 or not plan.is_quantized(parameter):
        return False
    if parameter.experts and plan.storage.routes:
        return sequences * plan.routed_experts <= few * plan.distinct_experts(sequences)
    return sequences <= few and not plan.architecture.is_routed


def _expanding_s(plan: Plan, one: _Pass, parameters: list[Parameter]) -> float:
    """Return the seconds to expand quantized weights, once per pass, and to multiply those that stay packed."""
    known, overlap, sequences = _measured(plan), plan.storage.overlap, plan.run.workload.sequences
    elements = 0.0
    for p in parameters:
        if not plan.is_quantized(p):
            continue
        each = p.numel / plan.experts if p.experts else p.numel
        if _is_packed(plan, one, p):
            elements += overlap.packed * each * sequences * (plan.routed_experts if p.experts else 1)
        elif p.experts:
            elements += overlap.expand * _expansion(plan, p) * each * _brought(plan, one)
        else:
            elements += overlap.expand * _expansion(plan, p) * each
    if known.expand_elements_per_s:
        return elements / known.expand_elements_per_s
    return _over(EXPANDED_BYTES * elements, _typical(plan, "hbm_bytes_per_s"))


def _expansion(plan: Plan, parameter: Parameter) -> float:
    """Return the time to expand a weight, as a multiple of that of an INT4 one in groups, whose rate is measured."""
    packing = plan.packing(parameter)
    assert packing is not None
    return EXPANSION[plan.machine.device][packing.format.code]


def _brought(plan: Plan, one: _Pass) -> float:
    """Return how many experts of a layer a pass brings."""
    return plan.distinct_experts(plan.run.workload.sequences) if _is_routed(plan, one) else plan.experts


def _load_s(plan: Plan) -> float | None:
    """Return the loading time: weights are created, quantized and placed, while a checkpoint is read; None if unknown."""
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
    """Return the harmonic mean over a rate's moments; the ceiling if it was measured only once, or typed."""
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
