"""Measure all rates of a machine, except those of its disks, in a few seconds."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import harmonic_mean
from typing import Any

import torch

from zi_experiments.calibration import launch_overhead, rates

_MORE_MOMENTS = 6  # if the machine is so busy that more layers took no longer than fewer
_GPU = {
    "link_back_bytes_per_s": rates.link_back_bytes_per_s,
    "link_both_bytes_per_s": rates.link_both_bytes_per_s,
    "pin_bytes_per_s": rates.pin_bytes_per_s,
}


def measure(device: str, dtypes: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return figures by their names in `Ceilings` and `Calibration`, None if not applicable; and notes on missing ones.

    `device` is "cuda" or "cpu", `dtypes` are 16-bit types, best first. Raises torch's errors, such as out of memory.
    """
    first, notes = getattr(torch, dtypes[0]), list[str]()
    found: dict[str, Any] = dict.fromkeys(_GPU)
    pace = _Pace(first, device)
    with torch.inference_mode():
        if device == "cuda":
            found |= {name: measured() for name, measured in _GPU.items()}
        pace.sample()
        found["gemm_flops"] = {name: rates.gemm_flops(getattr(torch, name), device) for name in dtypes}
        peaks = _Peaks(device, found["gemm_flops"])
        peaks.sample()
        found["host_bytes_per_s"] = rates.copy_bytes_per_s("cpu") if device == "cuda" else None
        pace.sample()
        peaks.sample()
        found["attention_flops"] = rates.attention_flops(first) if device == "cpu" else None
        found["cache_bytes_per_s"] = rates.cache_bytes_per_s(first) if device == "cpu" else None
        found["expand_elements_per_s"] = _expansion(first, device, notes)
        pace.sample()
        peaks.sample()
    return found | pace.figures(notes) | peaks.figures(), notes


class _Peaks:
    """Peak rates, sampled at several moments: other processes may compute at some; the best comes closest to the peak.

    `products` are rates by type and rows that are already measured; they count as samples too.
    """

    def __init__(self, device: str, products: dict[str, dict[int, float]]) -> None:
        self._products, self._on_gpu = products, device == "cuda"
        self._measured: dict[str, Callable[[], float]] = {"hbm_bytes_per_s": partial(rates.copy_bytes_per_s, device)}
        for name, curve in products.items():
            fastest = max(curve, key=curve.__getitem__)
            self._measured[name] = partial(rates.busy_flops, getattr(torch, name), device, fastest)
        if self._on_gpu:
            self._measured["link_bytes_per_s"] = rates.link_bytes_per_s
            self._measured["host_read_bytes_per_s"] = rates.host_read_bytes_per_s
            self._measured["host_memory_bytes_per_s"] = rates.host_memory_bytes_per_s
        self._moments: dict[str, list[float]] = defaultdict(list)

    def sample(self) -> None:
        for name, measure in self._measured.items():
            self._moments[name].append(measure())

    def figures(self) -> dict[str, Any]:
        """Return the ceilings, and all moments; a ceiling is the best of its moments."""
        products = self._products
        arithmetic = [rate for name in products for rate in (*self._moments[name], *products[name].values())]
        # a product takes two operations per row for each weight of two bytes, so this is its rate of reading weights
        reading = [rate / rows for curve in products.values() for rows, rate in curve.items()]
        return {
            # on a CPU, the device's memory is host memory, and predictions take the mean
            **({} if self._on_gpu else {"host_bytes_per_s": harmonic_mean(self._moments["hbm_bytes_per_s"])}),
            "link_bytes_per_s": max(self._moments.get("link_bytes_per_s", []), default=None),
            "host_read_bytes_per_s": max(self._moments.get("host_read_bytes_per_s", []), default=None),
            "host_memory_bytes_per_s": max(self._moments.get("host_memory_bytes_per_s", []), default=None),
            "hbm_bytes_per_s": max(self._moments["hbm_bytes_per_s"] + reading),
            "flops": max(arithmetic),
            "moments": dict(self._moments),
        }


class _Pace:
    """Rates that depend on one core of the host: others may slow it down for seconds, so take the mean of moments."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self._on_gpu = device == "cuda"
        self._overhead, self._pageable = launch_overhead.Overhead(dtype, device), list[float]()

    def sample(self) -> None:
        self._overhead.sample()
        if self._on_gpu:
            self._pageable.append(rates.link_pageable_bytes_per_s())

    def figures(self, notes: list[str]) -> dict[str, float | None]:
        layer_s, step_s = self._overhead.layer_and_step_s()
        for _ in range(_MORE_MOMENTS):
            if min(layer_s, step_s) > 0:
                break
            self.sample()
            layer_s, step_s = self._overhead.layer_and_step_s()
        pageable = harmonic_mean(self._pageable) if self._on_gpu else None  # mean of the copy times
        found = {"link_pageable_bytes_per_s": pageable, "layer_s": layer_s, "step_s": step_s}
        if min(layer_s, step_s) > 0:
            return found
        notes.append(
            f"launch overhead was not measured, the machine was too busy: {layer_s:.2g} s per layer, {step_s:.2g} s per step"
        )
        return found | {"layer_s": None, "step_s": None}


def _expansion(dtype: torch.dtype, device: str, notes: list[str]) -> float | None:
    try:
        return rates.expand_elements_per_s(dtype, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton passes on any exception of its compilers
        notes.append(f"the expansion of INT4 weights was not measured ({type(error).__name__}: {error})")
        return None
