"""Peak rates of a device, measured with simple operations: copies, products, the expansion of INT4 weights."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from statistics import median
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from zi_experiments.config.schema import Quant
from zi_experiments.engines.stream.quantized import expand, pack
from zi_experiments.engines.stream.slab import Layout, Place
from zi_experiments.models.packing import groupwise
from zi_experiments.runtime.pinned_memory import host_empty

COPY_BYTES = 1 << 29  # of one copy: larger than caches, and much longer than its launch
SQUARE = 8192  # rows and columns of a product that keeps a GPU busy
ROWS = (1, 8, 32, 128, 512, 4096)
WEIGHTS = {"cuda": (20480, 5120), "cpu": (8192, 2048)}  # a shape that transformers have
TURNS = {"cuda": 4, "cpu": 8}  # number of weights used in turn, so that none is still in a cache when it is used again
ATTENTION = (4, 32, 256, 64)  # sequences, heads, tokens, width of a head
INT4 = Quant(name="int4", bits=4, group_size=64, group_dim=1)

SHARED_S = 0.4  # for the rate of two kinds of reads at once: many copies, as whole ones count

_BATCH_S = 0.005  # of calls that are timed together, so that the launch of the first is negligible
_BUDGET_S = 0.15  # for one figure
_LEAST_BATCHES = 3
_LONGEST_S = 0.3  # of one product; larger ones are left out on slow CPUs


def link_bytes_per_s() -> float:
    """Return the rate of copies from pinned host memory to the first GPU."""
    host, there = _pinned(), _on_gpu()
    return COPY_BYTES / _seconds(lambda: there.copy_(host, non_blocking=True), "cuda")


def link_back_bytes_per_s() -> float:
    """Return the rate of copies from the first GPU to pinned host memory."""
    host, there = _pinned(), _on_gpu()
    return COPY_BYTES / _seconds(lambda: host.copy_(there, non_blocking=True), "cuda")


def link_both_bytes_per_s() -> float:
    """Return the rate of each direction while both are busy. It is timed until both copies end: the slower one's rate."""
    directions = (_on_gpu(), _pinned()), (_pinned(), _on_gpu())  # target and source
    main = torch.cuda.current_stream()
    sides = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def both() -> None:
        for side, (target, source) in zip(sides, directions, strict=True):
            side.wait_stream(main)
            with torch.cuda.stream(side):
                target.copy_(source, non_blocking=True)
        for side in sides:
            main.wait_stream(side)

    return COPY_BYTES / _seconds(both, "cuda")


def link_pageable_bytes_per_s() -> float:
    """Return the rate of copies from host memory that is not pinned, through the driver's buffers, to the first GPU."""
    host = host_empty(COPY_BYTES, torch.uint8, pinned=False).fill_(1)  # pages never written share one zero page
    there = _on_gpu()
    return COPY_BYTES / _seconds(lambda: there.copy_(host), "cuda")


def pin_bytes_per_s() -> float:
    """Return the rate of allocating pinned memory as engines do: new pages, written once, then registered with CUDA."""
    torch.cuda.synchronize()  # create the CUDA context before timing

    def once() -> float:
        began = time.perf_counter()
        made = host_empty(COPY_BYTES, torch.uint8, pinned=True)
        seconds = time.perf_counter() - began
        del made  # not earlier: unregistering is not timed
        return seconds

    return COPY_BYTES / median(once() for _ in range(3))


def copy_bytes_per_s(device: str) -> float:
    """Return bytes read plus bytes written per second, by a copy within a device's memory; on a CPU, with all threads."""
    source = torch.empty(2 * COPY_BYTES if device == "cuda" else COPY_BYTES, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def square_flops(dtype: torch.dtype) -> float:
    """Return the FLOP/s of large square matrices on the first GPU: random ones, since zeros need less power and are faster."""
    a, b = (torch.randn(SQUARE, SQUARE, dtype=dtype, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 2 * SQUARE**3 / _seconds(lambda: torch.mm(a, b, out=out), "cuda")


def busy_flops(dtype: torch.dtype, device: str, rows: int) -> float:
    """Return the FLOP/s of a product that keeps the device busy; on a CPU, one of so many rows with a single weight."""
    if device == "cuda":
        return square_flops(dtype)
    weight = torch.randn(WEIGHTS[device], dtype=dtype)
    return 2 * rows * weight.numel() / _product_s(rows, [weight])


def gemm_flops(dtype: torch.dtype, device: str) -> dict[int, float]:
    """Return the FLOP/s of `linear` by number of rows; on a slow CPU, large numbers that take too long are left out."""
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
    """Return the FLOP/s of causal attention over a prompt on the CPU; each token counts itself and earlier tokens only."""
    q, k, v = (torch.randn(ATTENTION, dtype=dtype) for _ in range(3))
    sequences, heads, tokens, width = ATTENTION
    seconds = _seconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True), "cpu")
    return 2 * sequences * heads * tokens**2 * width / seconds


def cache_bytes_per_s(dtype: torch.dtype) -> float:
    """Return the rate at which attention in a decode step reads the KV cache on the CPU."""
    k, v = (torch.randn(ATTENTION, dtype=dtype) for _ in range(2))
    q = k[:, :, :1].clone()
    return 2 * k.nbytes / _seconds(lambda: scaled_dot_product_attention(q, k, v), "cpu")


def expand_elements_per_s(dtype: torch.dtype, device: str) -> float:
    """Return the rate at which the stream engine expands INT4 weights in groups of 64 on that device."""
    place = Place(name="weight", shape=WEIGHTS[device], start=0, packing=groupwise(INT4))
    layout = Layout(plain=(), quantized=(place,))
    slab = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
    pack(torch.randn(place.shape, dtype=dtype, device=device), slab, layout, place)
    out = torch.empty(layout.elements, dtype=dtype, device=device)
    return layout.elements / _seconds(lambda: expand(slab, layout, out), device)


def host_read_bytes_per_s() -> float:
    """Return the rate at which all cores read host memory."""
    there = torch.ones(2 * COPY_BYTES // 4)
    return there.nbytes / _seconds(there.sum, "cpu")


def host_memory_bytes_per_s() -> float:
    """Return the rate at which host memory is read by all cores and by copies to the first GPU together."""
    there = torch.ones(2 * COPY_BYTES // 4)
    there.sum()
    with copies() as copied:
        read, before, began = 0, copied[0], time.perf_counter()
        while (elapsed_s := time.perf_counter() - began) < SHARED_S:
            there.sum()
            read += there.nbytes
        return (read + copied[0] - before) / elapsed_s


@contextmanager
def copies() -> Iterator[list[int]]:
    """Copy from pinned memory to the GPU, one copy after the other, in the context. Yield the bytes so far, in a list."""
    host, there = _pinned(), _on_gpu()
    copied, ended = [0], threading.Event()

    @torch.inference_mode()  # it is per thread
    def copy() -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        under_way = []
        while not ended.is_set():
            with torch.cuda.stream(stream):
                there.copy_(host, non_blocking=True)
                under_way.append(stream.record_event())
            if len(under_way) > 1:
                under_way.pop(0).synchronize()
                copied[0] += COPY_BYTES
        stream.synchronize()

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield copied
    finally:
        ended.set()
        thread.join()


def _pinned() -> Any:
    return host_empty(COPY_BYTES, torch.uint8, pinned=True)


def _on_gpu() -> torch.Tensor:
    return torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")


def _seconds(work: Callable[[], object], device: str) -> float:
    """Return the seconds of one call: the median over batches of calls, after one warm-up call."""
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
