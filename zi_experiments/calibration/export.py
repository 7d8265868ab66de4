"""Show a measured machine as a table, and write it as a file for `hardware=…`, so that runs can be planned elsewhere."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.table import Table

from zi_experiments import provenance
from zi_experiments.config.schema import ConfigError, DeviceType, Hardware
from zi_experiments.system.machines import GIB, Machine

_FIRST_LINE = "# measured by python -m zi_experiments.hardware"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_UNITS = {"bytes_per_s": (1e9, "GB/s"), "flops": (1e12, "TFLOP/s"), "elements_per_s": (1e9, "G/s"), "_s": (1e-3, "ms")}
_HOW = {
    "link_bytes_per_s": ("host to GPU", "pinned, copies of 512 MiB"),
    "link_back_bytes_per_s": ("GPU to host", "pinned, copies of 512 MiB"),
    "link_both_bytes_per_s": ("both at once, each way", "pinned, on two streams"),
    "link_pageable_bytes_per_s": ("host to GPU, not pinned", "copies of 512 MiB"),
    "pin_bytes_per_s": ("pinning", "new pages, written once and registered"),
    "host_bytes_per_s": ("host memory", "read and written by a copy with all threads"),
    "host_read_bytes_per_s": ("host memory, read", "by a sum with all threads"),
    "host_memory_bytes_per_s": ("host memory, read by all", "by that sum and copies to the GPU at once"),
    "hbm_bytes_per_s": ("memory of the device", "read and written by a copy"),
    "disk_bytes_per_s": ("disk, read", "O_DIRECT, as many requests in flight as a run has"),
    "disk_write_bytes_per_s": ("disk, written", "O_DIRECT, as many requests in flight as a run has"),
    "flops": ("peak arithmetic", "the fastest product of any type"),
    "attention_flops": ("attention over a prompt", "32 heads of 64, 256 tokens"),
    "cache_bytes_per_s": ("KV cache read", "by the attention of a decode step"),
    "expand_elements_per_s": ("INT4 weights expanded", "groups of 64, as engine=stream does it"),
    "layer_s": ("launching a layer", "decode of two very narrow OPT models"),
    "step_s": ("decode step outside layers", "decode of two very narrow OPT models"),
}


def table(machine: Machine) -> Table:
    """Return a table with a row for each figure."""
    calibration = machine.calibration
    assert calibration is not None
    made = Table(title=f"{machine.gpu_name or machine.device}, {machine.ceilings.source}")
    made.add_column("figure")
    made.add_column("value", justify="right")
    made.add_column("how it was measured")
    figures = vars(machine.ceilings) | vars(calibration)
    moments = calibration.moments or {}
    for name, (label, how) in _HOW.items():
        spread = f"; {_spread(name, moments[name])}" if name in moments else ""
        made.add_row(label, _shown(name, figures[name]), how + spread)
    for dtype, rates in calibration.gemm_flops.items():
        for rows, rate in rates.items():
            made.add_row(f"{dtype}, rows: {rows}", _shown("flops", rate), "linear with weights from memory")
    return made


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    scale, unit = next(known for ending, known in _UNITS.items() if name.endswith(ending))
    return f"{value / scale:.4g} {unit}"


def _spread(name: str, moments: list[float]) -> str:
    return f"{_shown(name, min(moments))} to {_shown(name, max(moments))} at {len(moments)} moments"


def default_name(machine: Machine) -> str:
    """Return the name of the GPU, or else of the CPU, as a file name: nvidia-h200."""
    text = machine.gpu_name or str(provenance.describe(machine)["cpu"])
    plain = re.sub(r"\((r|tm|c)\)|@.*", " ", text.lower())
    return re.sub(r"[^a-z0-9.]+", "-", plain).strip("-.") or "machine"


def destination(name: str, output: Path | None, shipped: Path) -> Path:
    """Return the path of the file: `output`, else in the folder `shipped`, or `./hardware` if that is not writable.

    Raises `ConfigError` for a file that Hydra would not find, and if it exists but was not written by this command.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"hardware={name} is not a valid choice: pass --name with letters, digits, '.', '_' and '-'")
    here = Path.cwd() / "hardware"
    path = output or (shipped if os.access(shipped, os.W_OK) else here) / f"{name}.yaml"
    path = path.expanduser().absolute()
    if path.name != f"{name}.yaml" or path.parent.name != "hardware":
        raise ConfigError(f"--output {output} cannot be found by Hydra: pass --output FOLDER/hardware/{name}.yaml")
    if path.exists() and not path.read_text(errors="replace").startswith(_FIRST_LINE):
        raise ConfigError(f"{path} exists already and was not written by this command: pass another --name")
    return path


def usage(path: Path, shipped: Path) -> str:
    """Return the command that plans for the machine in a file."""
    added = "" if path.parent == shipped else f"--config-dir {path.parent.parent} "
    return f"python -m zi_experiments {added}hardware={path.stem}"


def text(machine: Machine, name: str) -> str:
    """Return the content of the file: all `hardware` settings, with figures rounded to four digits."""
    assert machine.calibration is not None
    memory = machine.gpu_memory_bytes
    choice = Hardware(
        name=name,
        device=DeviceType(machine.device),
        gpu=machine.gpu_name,
        num_gpus=1,
        memory_gib=memory * 10 // GIB / 10 if memory else None,
        host_memory_gib=None,
        cpu_threads=None,
        dtypes=list(machine.dtypes),
        price_per_hour=None,
        peer_bytes_per_s=machine.peer_bytes_per_s,
        ceilings=replace(machine.ceilings, **_rounded(vars(machine.ceilings))),
        calibration=replace(machine.calibration, **_rounded(vars(machine.calibration))),
    )
    return f"{_FIRST_LINE}\n{OmegaConf.to_yaml(OmegaConf.structured(choice))}"


def _rounded(figures: dict[Any, Any]) -> dict[Any, Any]:
    return {name: _round(value) for name, value in figures.items()}


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return _rounded(value)
    if isinstance(value, list):
        return [_round(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
