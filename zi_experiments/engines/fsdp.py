"""PyTorch FSDP2: each decoder layer is sharded over the ranks, on GPUs or in host memory, and gathered before it runs.

Weights outside the layers are gathered once and stay gathered, which is FSDP2's default for the root module.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from zi_experiments.config.schema import ConfigError, OffloadDevice, Run
from zi_experiments.cost_model.inventory import Stored
from zi_experiments.cost_model.plan import Overlap, Plan, Storage, placement_of
from zi_experiments.cost_model.spec import ELEMENT_BYTES, Spec
from zi_experiments.engines import sixteen_bit
from zi_experiments.engines.hf_session import HFSession, host_cache
from zi_experiments.engines.modules import device_of, names_of, put
from zi_experiments.models import weights
from zi_experiments.models.structure import decoder_layers
from zi_experiments.runtime import distributed
from zi_experiments.runtime.progress import Progress
from zi_experiments.system.disk import Disk

PREFETCHED_LAYERS = 2
OVERLAP = Overlap(hidden=0.0, launch=2.1, stall=0.0, load_s=3.0, load_s_per_parameter=2e-9)
# on a CPU weights are copied once, into new pages, which the kernel clears first
COPIES_ON_CPU = 3.0


OPTIONS: frozenset[str] = frozenset()
CONFIG_NAME = "engine_config"


def check(run: Run) -> None:
    """Raise `ConfigError` for quantized weights and for weights on disk."""
    sixteen_bit.check(run)
    if run.offload.device is OffloadDevice.nvme:
        raise ConfigError("engine=fsdp keeps weights in memory: pass offload=cpu, or engine=accelerate")


def storage(spec: Spec) -> Storage:
    """Return the placement: all weights where `offload` says; on each GPU those outside the layers and a few layers."""
    placement, outside = placement_of(sixteen_bit.stored(spec)), ELEMENT_BYTES * spec.outside_numel
    # Several ranks: the layer that computes, the buffer it was gathered in, and the prefetched layers. One rank gathers
    # nothing and prefetches nothing: torch copies the parameters of a layer, one by one, when it is called.
    live = 2 if spec.run.hardware.num_gpus == 1 else 2 + PREFETCHED_LAYERS
    return Storage(
        placement=placement,
        streamed_bytes_per_pass=placement.total_bytes - outside if sixteen_bit.crosses_link(spec) else 0,
        gpu_buffer_bytes=live * ELEMENT_BYTES * spec.layer_numel + outside,
        overlap=OVERLAP if spec.machine.device == "cuda" else replace(OVERLAP, copies=COPIES_ON_CPU),
    )


def stored(plan: Plan) -> dict[str, Stored]:
    return sixteen_bit.stored(plan)


def requirements(plan: Plan) -> Iterator[str]:
    """Return nothing: torch is enough."""
    return iter(())


def disk_access(run: Run, folders: Sequence[Path]) -> Disk:
    """Not supported: `check` refuses weights on disk."""
    raise NotImplementedError


def config(plan: Plan, scratch: Sequence[str]) -> dict[str, Any]:
    """Return the options of FSDP2."""
    return {
        "cpu_offload": sixteen_bit.crosses_link(plan),
        "pin_memory": plan.pin_memory,
        "forward_prefetch": PREFETCHED_LAYERS,
    }


def prepare(plan: Plan, progress: Progress) -> None:
    distributed.init(plan.machine.device)


def load(plan: Plan, config: dict[str, Any], progress: Progress) -> HFSession:
    """Load the planned model, one whole decoder layer on the device at a time; each rank keeps its shard."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    device, dtype = device_of(plan), getattr(torch, plan.dtype)
    mesh = init_device_mesh(device.type, (plan.run.hardware.num_gpus,))
    policy = CPUOffloadPolicy(pin_memory=config["pin_memory"]) if config["cpu_offload"] else OffloadPolicy()
    progress.begin("load", plan.weight_bytes, "bytes")
    with closing(weights.of(plan.run.weights, plan.architecture.config, dtype)) as source:
        model = weights.empty_model(source, plan.architecture.config, dtype, device)
        names = {first: [first, *others] for first, *others in names_of(model)}
        layers = list(decoder_layers(model)[1])
        for index, module in [*enumerate(layers), (None, model)]:
            for p in plan.architecture.parameters:
                if p.layer == index:
                    put(model, names[p.name], sixteen_bit.value(plan, source, p, device))
                    progress.advance(ELEMENT_BYTES * p.numel)
            fully_shard(module, mesh=mesh, offload_policy=policy)
    _prefetch([model, *layers], config["forward_prefetch"])
    progress.end()
    return HFSession(model, device, host_cache(plan, device))


def _prefetch(units: list[Any], count: int) -> None:
    """Let each unit prefetch the next `count` units, and make the buffers of all units now.

    The first pass of a single rank would make them in inference mode, as inference tensors. torch then fails to fill
    them, because it needs their version counter (https://github.com/pytorch/pytorch/pull/197327).
    """
    for index, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[index + 1 : index + 1 + count])
        unit.unshard()
        unit.reshard()
