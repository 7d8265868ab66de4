"""A model's modules and the device that they compute on."""

from typing import Any

from zi_experiments.cost_model.plan import Plan
from zi_experiments.runtime import distributed


def device_of(plan: Plan) -> Any:
    """The device that this rank computes on."""
    import torch

    return (
        torch.device("cuda", distributed.launched_local_rank())
        if plan.machine.device == "cuda"
        else torch.device("cpu")
    )


def names_of(model: Any) -> list[list[str]]:
    """All names of each parameter: a tied one has several, of which the first is the one that a plan calls it by."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def put(model: Any, names: list[str], tensor: Any) -> None:
    """Make a tensor the parameter of all these names."""
    from torch import nn

    parameter = nn.Parameter(tensor, requires_grad=False)
    for name in names:
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._parameters[key] = parameter
