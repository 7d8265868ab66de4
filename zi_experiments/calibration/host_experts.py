"""How fast the host's cores compute a run's experts in decode steps, while copies to the GPU run."""

import os
import time
from itertools import starmap
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from zi_experiments.calibration import rates
from zi_experiments.engines.stream import host_experts, host_int4
from zi_experiments.engines.stream.host_experts import Product
from zi_experiments.engines.stream.quantized import Packed
from zi_experiments.runtime.pinned_memory import host_empty

LEAST_BYTES = 3 << 29  # of the experts that are computed in turn: much more than caches keep
BUDGET_S = 1.5


def measure(
    shapes: list[list[int]],
    transposed: bool,
    dtype: str,
    group_size: int | None,
    rows: int,
    threads: int,
    cores: list[int],
) -> dict[str, float | None]:
    """Return figures by their names in `Calibration`, for experts with `rows` tokens each.

    `shapes` are those of an expert's matrices, in their order; `group_size` is that of INT4 weights, None in 16 bits.
    """
    if torch.cuda.is_available():
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    with torch.inference_mode():
        experts, nbytes = _experts(shapes, transposed, kind, group_size)
        inputs, inner = (shapes[0][0] if transposed else shapes[0][1]), (shapes[-1][0] if transposed else shapes[-1][1])
        x = torch.full((rows, inputs), 0.01, dtype=kind)
        if not torch.cuda.is_available():
            return {"host_experts_bytes_per_s": nbytes / _expert_s(experts, x, inner), "link_busy_bytes_per_s": None}
        with rates.copies() as copied:
            before, began = copied[0], time.perf_counter()
            busy_s = _expert_s(experts, x, inner)
            link = (copied[0] - before) / (time.perf_counter() - began)
    return {"host_experts_bytes_per_s": nbytes / busy_s, "link_busy_bytes_per_s": link}


def _experts(
    shapes: list[list[int]], transposed: bool, dtype: torch.dtype, group_size: int | None
) -> tuple[list[list[Product]], int]:
    """Return the products of experts of equal values, each with memory of its own, and the bytes of one."""
    made: list[list[Product]] = []
    nbytes = 0

    def product(rows: int, columns: int) -> tuple[Product, int]:
        if group_size is not None:
            weight = packed(rows, columns, dtype, group_size)
            return host_int4.Int4Linear(weight, None), sum(part.nbytes for part in weight)
        plain = host_empty(rows * columns, dtype, pinned=False).view(rows, columns).fill_(0.01)
        return host_experts.product(plain, None, transposed=transposed), plain.nbytes

    while len(made) < 2 or nbytes * len(made) < LEAST_BYTES:
        products, sizes = zip(*starmap(product, shapes), strict=True)
        made.append(list(products))
        nbytes = sum(sizes)
    return made, nbytes


def packed(outputs: int, inputs: int, dtype: torch.dtype, group_size: int) -> Packed:
    """Return an INT4 matrix of equal weights, in memory of its own."""

    def filled(columns: int, kind: torch.dtype, value: float) -> torch.Tensor:
        made: torch.Tensor = host_empty(outputs * columns, kind, pinned=False)
        return made.view(outputs, columns).fill_(value)

    groups = inputs // group_size
    return Packed(filled(inputs // 2, torch.uint8, 0x5A), filled(groups, dtype, 100), filled(groups, dtype, 0.01))


def _expert_s(experts: list[list[Product]], x: torch.Tensor, inner: int) -> float:
    """Return the median seconds of an expert; `inner` is the width between its products."""
    spent: list[float] = []
    until = time.perf_counter() + BUDGET_S
    while len(spent) < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        _compute(experts[len(spent) % len(experts)], x, inner)
        spent.append(time.perf_counter() - began)
    return median(spent[1:])  # the first allocates


def _compute(products: list[Any], x: torch.Tensor, inner: int) -> torch.Tensor:
    """Compute an expert as most are: products, with an activation and perhaps a gate between them."""
    first, last = products[0](x), products[-1]
    gated = functional.silu(first[..., :inner])
    output: torch.Tensor = last(gated * first[..., inner:] if first.shape[-1] > inner else gated)
    return output
