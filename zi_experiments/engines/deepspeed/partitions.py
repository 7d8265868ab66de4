"""The inventory of a model under ZeRO stage 3, read from its partitions."""

from collections.abc import Iterator
from typing import Any

from zi_experiments.cost_model.inventory import Home, Inventory, Stored, held, home_on
from zi_experiments.cost_model.spec import ELEMENT_BYTES
from zi_experiments.runtime import distributed


def inventory(model: Any, device: Any) -> Inventory:
    """Return this rank's part of a model that `deepspeed.initialize` has wrapped and that computes on `device`.

    Small parameters persist: the first pass gathers them on the device, where they stay. Their partitions stay as well.
    """
    parameters = dict(model.named_parameters())
    stored = {
        name: Stored(numel=parameter.ds_numel, home=_home(parameter, device)) for name, parameter in parameters.items()
    }
    pieces = [piece for parameter in parameters.values() for piece in _pieces(parameter, device)]
    numel = sum(_own_numel(parameter) for parameter in parameters.values())
    return Inventory(parameters=stored, held=held(pieces, ELEMENT_BYTES * numel))


def _home(parameter: Any, device: Any) -> Home:
    return home_on(device) if parameter.ds_persist else _partition_home(parameter.ds_tensor)


def _pieces(parameter: Any, device: Any) -> Iterator[tuple[Home, int]]:
    partition = parameter.ds_tensor
    # not the size of the tensor: for a partition in an NVMe buffer it is the whole buffer
    yield _partition_home(partition), ELEMENT_BYTES * partition.ds_numel
    if parameter.ds_persist and home_on(device) is not _partition_home(partition):
        yield home_on(device), ELEMENT_BYTES * parameter.ds_numel


def _partition_home(partition: Any) -> Home:
    return home_on(partition.device) if partition.final_location is None else Home(partition.final_location.value)


def _own_numel(parameter: Any) -> int:
    """Return the elements of a parameter in this rank's partition, without the padding of the last partitions."""
    size: int = parameter.ds_tensor.ds_numel
    left: int = parameter.ds_numel - distributed.rank() * size
    return max(0, min(size, left))
