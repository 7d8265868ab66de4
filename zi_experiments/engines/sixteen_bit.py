"""Functions shared by the engines that keep plain 16-bit weights."""

from typing import Any

from zi_experiments.config.schema import ConfigError, OffloadDevice, Run
from zi_experiments.cost_model.inventory import Home, Stored
from zi_experiments.cost_model.plan import Plan
from zi_experiments.cost_model.spec import Spec
from zi_experiments.models.architecture import Parameter


def check(run: Run) -> None:
    """Raise `ConfigError` for quantized weights."""
    if run.quant.bits != 16:
        raise ConfigError(f"engine={run.engine.name} keeps 16-bit weights: pass quant=fp16, or engine=stream")


def stored(spec: Spec) -> dict[str, Stored]:
    """Return how each parameter is stored, by name: all of them where `offload` says."""
    offload = spec.run.offload.device
    home = spec.device_home if offload is OffloadDevice.none else Home(offload.value)
    return {p.name: Stored(numel=p.numel, home=home) for p in spec.architecture.parameters}


def crosses_link(spec: Spec) -> bool:
    """Return whether weights are copied to a GPU before each use."""
    return spec.machine.device == "cuda" and spec.run.offload.device is not OffloadDevice.none


def value(plan: Plan, source: Any, parameter: Parameter, device: Any) -> Any:
    """Return a parameter's value from `weights.of`, made on the device that computes: random ones differ by device."""
    import torch

    tensor = torch.empty(parameter.shape, dtype=getattr(torch, plan.dtype), device=device)
    source.fill(parameter.name, tensor)
    return tensor
