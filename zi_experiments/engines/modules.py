"""Helpers for a model's parameters and for the device of this rank."""

from typing import Any

from zi_experiments.cost_model.plan import Plan
from zi_experiments.runtime import distributed


def device_of(plan: Plan) -> Any:
    """Return the device that this rank computes on."""
    import torch

    return (
        torch.device("cuda", distributed.launched_local_rank())
        if plan.machine.device == "cuda"
        else torch.device("cpu")
    )


def names_of(model: Any) -> list[list[str]]:
    """Return all names of each parameter. A tied parameter has several; the first one is its name in a plan."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def put(model: Any, names: list[str], tensor: Any) -> None:
    """Make `tensor` the parameter at each of `names`."""
    from torch import nn

    parameter = nn.Parameter(tensor, requires_grad=False)
    for name in names:
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._parameters[key] = parameter
