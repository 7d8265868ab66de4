"""What ZeRO stage 3 holds of a model, read off its partitions."""

from typing import Any

from zi_experiments import distributed
from zi_experiments.inventory import Home, Inventory, Stored, held, home_of
from zi_experiments.plan import ELEMENT_BYTES


def inventory(model: Any) -> Inventory:
    """This rank's partitions of a model that `deepspeed.initialize` has taken."""
    parameters = dict(model.named_parameters())
    homes = {name: _home(parameter.ds_tensor) for name, parameter in parameters.items()}
    stored = {name: Stored(numel=parameter.ds_numel, home=homes[name]) for name, parameter in parameters.items()}
    # of a partition in an NVMe buffer, `ds_tensor` is the whole buffer
    pieces = [(homes[name], ELEMENT_BYTES * parameter.ds_tensor.ds_numel) for name, parameter in parameters.items()]
    numel = sum(_own_numel(parameter) for parameter in parameters.values())
    return Inventory(parameters=stored, held=held(pieces, ELEMENT_BYTES * numel))


def _home(partition: Any) -> Home:
    return home_of(partition) if partition.final_location is None else Home(partition.final_location.value)


def _own_numel(parameter: Any) -> int:
    """Elements of a parameter in this rank's partition; the last partitions are filled up."""
    size: int = parameter.ds_tensor.ds_numel
    left: int = parameter.ds_numel - distributed.rank() * size
    return max(0, min(size, left))
