"""Everything that is measured of a machine but its disks, in one go of a few seconds."""

from statistics import harmonic_mean
from typing import Any

import torch

from zi_experiments.hardware import overhead, rates

_GPU = {
    "link_bytes_per_s": rates.link_bytes_per_s,
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
        found["host_bytes_per_s"] = rates.copy_bytes_per_s("cpu")
        found["hbm_bytes_per_s"] = rates.copy_bytes_per_s(device) if device == "cuda" else found["host_bytes_per_s"]
        found["gemm_flops"] = {name: rates.gemm_flops(getattr(torch, name), device) for name in dtypes}
        pace.sample()
        found["attention_flops"] = rates.attention_flops(first) if device == "cpu" else None
        found["cache_bytes_per_s"] = rates.cache_bytes_per_s(first) if device == "cpu" else None
        square = [rates.square_flops(first)] if device == "cuda" else []
        found["flops"] = max(square + list(found["gemm_flops"][dtypes[0]].values()))
        found["expand_elements_per_s"] = _expansion(first, device, notes)
        pace.sample()
    return found | pace.figures(notes), notes


class _Pace:
    """What one core of the host takes part in, which others may slow down for seconds: the mean of several moments."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self._on_gpu = device == "cuda"
        self._overhead, self._pageable = overhead.Overhead(dtype, device), list[float]()

    def sample(self) -> None:
        self._overhead.sample()
        if self._on_gpu:
            self._pageable.append(rates.link_pageable_bytes_per_s())

    def figures(self, notes: list[str]) -> dict[str, float | None]:
        pageable = harmonic_mean(self._pageable) if self._on_gpu else None  # of the times that copies took
        layer_s, step_s = self._overhead.layer_and_step_s()
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
