"""What the engines that keep plain 16-bit weights have in common."""

from typing import Any

from zi_experiments.architecture import Parameter
from zi_experiments.config import ConfigError, OffloadDevice
from zi_experiments.plan import ELEMENT_BYTES, Placement, Plan


def refuse_quantized(plan: Plan) -> None:
    if plan.run.quant.bits != 16:
        raise ConfigError(f"engine={plan.run.engine.name} keeps 16-bit weights: pass quant=fp16, or engine=stream")


def placement(plan: Plan) -> Placement:
    """All weights where `offload` says."""
    everything = ELEMENT_BYTES * plan.architecture.num_parameters
    home = plan.run.offload.device
    if home is OffloadDevice.none and plan.machine.device == "cpu":
        home = OffloadDevice.cpu
    return Placement(
        gpu_bytes=everything if home is OffloadDevice.none else 0,
        cpu_bytes=everything if home is OffloadDevice.cpu else 0,
        nvme_bytes=everything if home is OffloadDevice.nvme else 0,
    )


def crosses_link(plan: Plan) -> bool:
    """Whether weights have to come to a GPU before they are computed with."""
    return plan.machine.device == "cuda" and plan.run.offload.device is not OffloadDevice.none


def value(plan: Plan, source: Any, parameter: Parameter, device: Any) -> Any:
    """A parameter's value from `weights.of`, made where it will be computed with: random ones differ between devices."""
    import torch

    tensor = torch.empty(parameter.shape, dtype=getattr(torch, plan.dtype), device=device)
    source.fill(parameter.name, tensor)
    return tensor
