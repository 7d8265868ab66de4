"""Hugging Face accelerate: weights in pageable host memory or memory-mapped files, copied to the GPU module by module.

Its hooks copy a module's weights when it is called, without overlap. Files are read through the page cache.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from zi_experiments.config.schema import ConfigError, OffloadDevice, Run
from zi_experiments.cost_model.inventory import Home, Inventory, Stored, held, home_on
from zi_experiments.cost_model.plan import Overlap, Plan, Storage, placement_of
from zi_experiments.cost_model.spec import ELEMENT_BYTES, Spec
from zi_experiments.engines import sixteen_bit
from zi_experiments.engines.disk_access import MOST_IN_FLIGHT, check_one_folder, reading
from zi_experiments.engines.hf_session import HFSession, host_cache
from zi_experiments.engines.modules import device_of, names_of, put
from zi_experiments.models import weights
from zi_experiments.runtime import distributed
from zi_experiments.runtime.progress import Progress
from zi_experiments.system.disk import Disk

OVERLAP = Overlap(hidden=0.0, launch=4.0, stall=0.0, load_s=3.0, load_s_per_parameter=1e-9)
Values = Iterator[tuple[list[str], Any]]  # for each parameter: all its names, its value on the device


OPTIONS: frozenset[str] = frozenset()
CONFIG_NAME = "engine_config"


def check(run: Run) -> None:
    """Raise `ConfigError` for what accelerate does not support: quantized weights, several GPUs, pinned memory."""
    sixteen_bit.check(run)
    check_one_folder(run)
    if run.hardware.num_gpus > 1:
        raise ConfigError(
            f"engine=accelerate uses one GPU, not {run.hardware.num_gpus}: pass hardware.num_gpus=1, or engine=fsdp"
        )
    if run.offload.pin_memory:
        raise ConfigError(
            "engine=accelerate keeps weights in pageable memory: pass offload.pin_memory=false, or engine=fsdp"
        )


def storage(spec: Spec) -> Storage:
    """Return the placement: all weights where `offload` says, and those of one module at a time on the GPU."""
    placement = placement_of(sixteen_bit.stored(spec))
    streams, on_disk = sixteen_bit.crosses_link(spec), spec.run.offload.device is OffloadDevice.nvme
    largest = _largest_module_bytes(spec)
    return Storage(
        placement=placement,
        streamed_bytes_per_pass=placement.total_bytes if streams else 0,
        host_buffer_bytes=largest if on_disk else 0,
        gpu_buffer_bytes=largest if streams else 0,
        pinnable=False,
        overlap=OVERLAP,
    )


def stored(plan: Plan) -> dict[str, Stored]:
    return sixteen_bit.stored(plan)


def requirements(plan: Plan) -> Iterator[str]:
    """Return nothing: torch is enough."""
    return iter(())


def disk_access(run: Run, folders: Sequence[Path]) -> Disk:
    """Return the disk of `folders` with the most requests in flight: the kernel reads ahead in memory-mapped files."""
    return reading(folders, None, MOST_IN_FLIGHT)


def config(plan: Plan, scratch: Sequence[str]) -> dict[str, Any]:
    """Return the name of the accelerate function to call and, for weights on disk, its folder."""
    offload = plan.run.offload.device
    if offload is OffloadDevice.none:
        return {"call": None}
    if offload is OffloadDevice.cpu:
        return {"call": "cpu_offload"}
    return {"call": "disk_offload", "offload_dir": scratch[0]}


def prepare(plan: Plan, progress: Progress) -> None:
    distributed.init(plan.machine.device)


def load(plan: Plan, config: dict[str, Any], progress: Progress) -> HFSession:
    """Load the planned model, one parameter at a time, and hook its modules. Return its session."""
    import torch

    device, dtype = device_of(plan), getattr(torch, plan.dtype)
    keep = {None: _on_device, "cpu_offload": _in_host_memory, "disk_offload": _on_disk}[config["call"]]
    progress.begin("load", plan.weight_bytes, "bytes")
    with closing(weights.of(plan.run.weights, plan.architecture.config, dtype)) as source:
        model = weights.empty_model(source, plan.architecture.config, dtype, device)
        names = names_of(model)  # hooks put parameters on the meta device, where none are tied
        keep(model, _values(plan, model, source, device, progress), device, config)
    progress.end()
    return HFSession(model, device, host_cache(plan, device), inventory=partial(_inventory, model, names))


def _values(plan: Plan, model: Any, source: Any, device: Any, progress: Progress) -> Values:
    parameters = {p.name: p for p in plan.architecture.parameters}
    for names in names_of(model):
        parameter = parameters[names[0]]
        yield names, sixteen_bit.value(plan, source, parameter, device)
        progress.advance(ELEMENT_BYTES * parameter.numel)


def _on_device(model: Any, values: Values, device: Any, config: dict[str, Any]) -> None:
    for names, value in values:
        put(model, names, value)


def _in_host_memory(model: Any, values: Values, device: Any, config: dict[str, Any]) -> None:
    from accelerate import cpu_offload

    held: dict[str, Any] = {}
    for names, value in values:
        held.update(dict.fromkeys(names, value.cpu()))
    cpu_offload(model, execution_device=device, state_dict=held)


def _on_disk(model: Any, values: Values, device: Any, config: dict[str, Any]) -> None:
    from accelerate import disk_offload
    from accelerate.utils import offload_weight, save_offload_index

    folder = Path(config["offload_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {}
    for (name, *others), value in values:
        offload_weight(value, name, folder, index)
        for other in others:  # accelerate wants a file for each name of a tied parameter
            (folder / f"{other}.dat").hardlink_to(folder / f"{name}.dat")
            index[other] = index[name]
    save_offload_index(index, folder)
    disk_offload(model, folder, execution_device=device)


def _inventory(model: Any, names: list[list[str]]) -> Inventory:
    pieces = {name: _held(model, name) for name, *_ in names}
    parameters = {name: Stored(numel=nbytes // ELEMENT_BYTES, home=home) for name, (home, nbytes) in pieces.items()}
    return Inventory(parameters=parameters, held=held(pieces.values(), sum(nbytes for _, nbytes in pieces.values())))


def _held(model: Any, name: str) -> tuple[Home, int]:
    """Return where accelerate reads a parameter from when its module is called, and its bytes there."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    hook = getattr(module, "_hf_hook", None)
    source = getattr(hook, "weights_map", None)
    if source is None:
        tensor = module._parameters[key]
        return home_on(tensor.device), tensor.nbytes
    if (folder := getattr(source.dataset, "save_folder", None)) is not None:
        return Home.nvme, (Path(folder) / f"{name}.dat").stat().st_size
    return home_on(source[key].device), source[key].nbytes


def _largest_module_bytes(spec: Spec) -> int:
    """Return the largest weight bytes of a single module, without its submodules."""
    modules: Counter[str] = Counter()
    for p in spec.architecture.parameters:
        modules[p.name.rpartition(".")[0]] += ELEMENT_BYTES * p.numel
    return max(modules.values())
