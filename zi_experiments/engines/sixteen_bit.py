"""What the engines that keep plain 16-bit weights have in common."""

from typing import Any

from zi_experiments.config.schema import ConfigError, OffloadDevice
from zi_experiments.cost_model.inventory import Home, Stored
from zi_experiments.cost_model.plan import Plan
from zi_experiments.models.architecture import Parameter


def refuse_quantized(plan: Plan) -> None:
    if plan.run.quant.bits != 16:
        raise ConfigError(f"engine={plan.run.engine.name} keeps 16-bit weights: pass quant=fp16, or engine=stream")


def stored(plan: Plan) -> dict[str, Stored]:
    """All weights where `offload` says."""
    offload = plan.run.offload.device
    home = plan.device_home if offload is OffloadDevice.none else Home(offload.value)
    return {p.name: Stored(numel=p.numel, home=home) for p in plan.architecture.parameters}


def crosses_link(plan: Plan) -> bool:
    """Whether weights have to come to a GPU before they are computed with."""
    return plan.machine.device == "cuda" and plan.run.offload.device is not OffloadDevice.none


def value(plan: Plan, source: Any, parameter: Parameter, device: Any) -> Any:
    """A parameter's value from `weights.of`, made where it will be computed with: random ones differ between devices."""
    import torch

    tensor = torch.empty(parameter.shape, dtype=getattr(torch, plan.dtype), device=device)
    source.fill(parameter.name, tensor)
    return tensor
