"""Everything that is measured of a machine but its disks, in one go of a few seconds."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import harmonic_mean
from typing import Any

import torch

from zi_experiments.calibration import launch_overhead, rates

_MORE_MOMENTS = 6  # on a machine so busy that more layers took no longer than fewer
_GPU = {
    "link_back_bytes_per_s": rates.link_back_bytes_per_s,
    "link_both_bytes_per_s": rates.link_both_bytes_per_s,
    "pin_bytes_per_s": rates.pin_bytes_per_s,
}


def measure(device: str, dtypes: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Figures by the names in `Ceilings` and `Calibration`, None for what there is not; and why some are missing.

    `device` is "cuda" or "cpu", `dtypes` are 16-bit types, best first. Raises what torch raises, such as when memory runs out.
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
    """What bounds a run, at several moments: at some of them others compute, and nothing is faster than the machine.

    `products` are rates by type and rows, which count as well.
    """

    def __init__(self, device: str, products: dict[str, dict[int, float]]) -> None:
        self._products, self._on_gpu = products, device == "cuda"
        self._measured: dict[str, Callable[[], float]] = {"hbm_bytes_per_s": partial(rates.copy_bytes_per_s, device)}
        for name, curve in products.items():
            fastest = max(curve, key=curve.__getitem__)
            self._measured[name] = partial(rates.busy_flops, getattr(torch, name), device, fastest)
        if self._on_gpu:
            self._measured["link_bytes_per_s"] = rates.link_bytes_per_s
        self._moments: dict[str, list[float]] = defaultdict(list)

    def sample(self) -> None:
        for name, measure in self._measured.items():
            self._moments[name].append(measure())

    def figures(self) -> dict[str, Any]:
        """The ceilings, and the moments that they are the best of."""
        products = self._products
        arithmetic = [rate for name in products for rate in (*self._moments[name], *products[name].values())]
        # two operations with each row for every weight of two bytes
        reading = [rate / rows for curve in products.values() for rows, rate in curve.items()]
        return {
            # memory of the host is that of a processor, and predictions take the mean
            **({} if self._on_gpu else {"host_bytes_per_s": harmonic_mean(self._moments["hbm_bytes_per_s"])}),
            "link_bytes_per_s": max(self._moments.get("link_bytes_per_s", []), default=None),
            "hbm_bytes_per_s": max(self._moments["hbm_bytes_per_s"] + reading),
            "flops": max(arithmetic),
            "moments": dict(self._moments),
        }


class _Pace:
    """What one core of the host takes part in, which others may slow down for seconds: the mean of several moments."""

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
        pageable = harmonic_mean(self._pageable) if self._on_gpu else None  # of the times that copies took
        found = {"link_pageable_bytes_per_s": pageable, "layer_s": layer_s, "step_s": step_s}
        if min(layer_s, step_s) > 0:
            return found
        notes.append(
            f"a layer took {layer_s:.2g} s and a step {step_s:.2g} s, which the machine was too busy for to count"
        )
        return found | {"layer_s": None, "step_s": None}


def _expansion(dtype: torch.dtype, device: str, notes: list[str]) -> float | None:
    try:
        return rates.expand_elements_per_s(dtype, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton raises whatever its compilers do
        notes.append(f"the expansion of INT4 weights was not measured ({type(error).__name__}: {error})")
        return None
