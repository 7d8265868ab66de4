"""What a device does at best, measured with nothing in the way: plain copies, products, the expansion of INT4 weights."""

import time
from collections.abc import Callable
from itertools import cycle
from statistics import median
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from zi_experiments.config.schema import Quant
from zi_experiments.engines.stream.quantized import expand, pack
from zi_experiments.engines.stream.slab import Layout, Place
from zi_experiments.runtime.pinned_memory import host_empty

COPY_BYTES = 1 << 29  # of one copy: larger than caches, and long beside its launch
SQUARE = 8192  # rows and columns of a product that keeps a GPU busy
ROWS = (1, 8, 32, 128, 512, 4096)
WEIGHTS = {"cuda": (20480, 5120), "cpu": (8192, 2048)}  # of a transformer's shape
TURNS = {"cuda": 4, "cpu": 8}  # weights that take turns, so that none waits in a cache for its next one
ATTENTION = (4, 32, 256, 64)  # sequences, heads, tokens, width of a head
INT4 = Quant(name="int4", bits=4, group_size=64, group_dim=1)

_BATCH_S = 0.005  # of calls that are timed together: launching the first of them counts for nothing beside that
_BUDGET_S = 0.15  # for one figure
_LEAST_BATCHES = 3
_LONGEST_S = 0.3  # of one product; slow processors leave out larger ones


def link_bytes_per_s() -> float:
    """From pinned host memory to the first GPU."""
    host, there = _pinned(), _on_gpu()
    return COPY_BYTES / _seconds(lambda: there.copy_(host, non_blocking=True), "cuda")


def link_back_bytes_per_s() -> float:
    """From the first GPU to pinned host memory."""
    host, there = _pinned(), _on_gpu()
    return COPY_BYTES / _seconds(lambda: host.copy_(there, non_blocking=True), "cuda")


def link_both_bytes_per_s() -> float:
    """Each way while the other is as busy: until both copies are done, so it is the slower one's."""
    ways = (_on_gpu(), _pinned()), (_pinned(), _on_gpu())  # target and source
    main = torch.cuda.current_stream()
    sides = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def both() -> None:
        for side, (target, source) in zip(sides, ways, strict=True):
            side.wait_stream(main)
            with torch.cuda.stream(side):
                target.copy_(source, non_blocking=True)
        for side in sides:
            main.wait_stream(side)

    return COPY_BYTES / _seconds(both, "cuda")


def link_pageable_bytes_per_s() -> float:
    """From host memory that CUDA does not know, through the driver's own buffers, to the first GPU."""
    host = host_empty(COPY_BYTES, torch.uint8, pinned=False).fill_(1)  # pages that were never written are all the same
    there = _on_gpu()
    return COPY_BYTES / _seconds(lambda: there.copy_(host), "cuda")


def pin_bytes_per_s() -> float:
    """Of host memory as engines take it: new pages, written once, then registered with CUDA."""
    torch.cuda.synchronize()  # the context is there

    def once() -> float:
        began = time.perf_counter()
        made = host_empty(COPY_BYTES, torch.uint8, pinned=True)
        seconds = time.perf_counter() - began
        del made  # only now, since it has to be unregistered
        return seconds

    return COPY_BYTES / median(once() for _ in range(3))


def copy_bytes_per_s(device: str) -> float:
    """Bytes read and bytes written by a copy within a device's memory; on a CPU, with all threads."""
    source = torch.empty(2 * COPY_BYTES if device == "cuda" else COPY_BYTES, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def square_flops(dtype: torch.dtype) -> float:
    """Of a product of large square matrices on the first GPU. Of random numbers: zeros draw less power and are faster."""
    a, b = (torch.randn(SQUARE, SQUARE, dtype=dtype, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 2 * SQUARE**3 / _seconds(lambda: torch.mm(a, b, out=out), "cuda")


def busy_flops(dtype: torch.dtype, device: str, rows: int) -> float:
    """Of a product that keeps the device busy: on a processor, of so many rows, with a weight of its own."""
    if device == "cuda":
        return square_flops(dtype)
    weight = torch.randn(WEIGHTS[device], dtype=dtype)
    return 2 * rows * weight.numel() / _product_s(rows, [weight])


def gemm_flops(dtype: torch.dtype, device: str) -> dict[int, float]:
    """Of `linear` on so many rows; on a slow processor only up to as many as take a moment."""
    weight = torch.randn(WEIGHTS[device], dtype=dtype, device=device)
    weights = [weight, *(weight.clone() for _ in range(TURNS[device] - 1))]
    rates: dict[int, float] = {}
    for rows in ROWS:
        operations = 2 * rows * weight.numel()
        if rates and operations / max(rates.values()) > _LONGEST_S:
            break
        rates[rows] = operations / _product_s(rows, weights)
    return rates


def _product_s(rows: int, weights: list[torch.Tensor]) -> float:
    x = torch.randn(rows, weights[0].shape[1], dtype=weights[0].dtype, device=weights[0].device)
    turn = cycle(weights)
    return _seconds(lambda: linear(x, next(turn)), x.device.type)


def attention_flops(dtype: torch.dtype) -> float:
    """Of causal attention over a prompt on the CPU: the products of each token with itself and those before it."""
    q, k, v = (torch.randn(ATTENTION, dtype=dtype) for _ in range(3))
    sequences, heads, tokens, width = ATTENTION
    seconds = _seconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True), "cpu")
    return 2 * sequences * heads * tokens**2 * width / seconds


def cache_bytes_per_s(dtype: torch.dtype) -> float:
    """Of keys and values, as the attention of one more token of each sequence reads them on the CPU."""
    k, v = (torch.randn(ATTENTION, dtype=dtype) for _ in range(2))
    q = k[:, :, :1].clone()
    return 2 * k.nbytes / _seconds(lambda: scaled_dot_product_attention(q, k, v), "cpu")


def expand_elements_per_s(dtype: torch.dtype, device: str) -> float:
    """Of INT4 weights in groups of 64, by what the stream engine does it with there."""
    place = Place(name="weight", shape=WEIGHTS[device], start=0)
    layout = Layout(plain=(), quantized=(place,), quant=INT4, shares=1)
    slab = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
    pack(torch.randn(place.shape, dtype=dtype, device=device), slab, layout, place)
    out = torch.empty(layout.elements, dtype=dtype, device=device)
    return layout.elements / _seconds(lambda: expand(slab, layout, out), device)


def _pinned() -> Any:
    return host_empty(COPY_BYTES, torch.uint8, pinned=True)


def _on_gpu() -> torch.Tensor:
    return torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")


def _seconds(work: Callable[[], object], device: str) -> float:
    """Of one call: the median over batches of them, after one that warms up."""
    work()
    once = _elapsed_s(work, 1, device)
    calls = max(1, min(1000, round(_BATCH_S / once)))
    batches = [once] if calls == 1 else []
    until = time.perf_counter() + _BUDGET_S
    while len(batches) < _LEAST_BATCHES or time.perf_counter() < until:
        batches.append(_elapsed_s(work, calls, device) / calls)
    return median(batches)


def _elapsed_s(work: Callable[[], object], calls: int, device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        for _ in range(calls):
            work()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
