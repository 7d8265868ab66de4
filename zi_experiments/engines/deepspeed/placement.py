"""What ZeRO stage 3 does with the weights of a plan: what stays on the GPU, what is swapped, which buffers. Pure figures."""

from collections import Counter
from dataclasses import replace
from math import ceil

from zi_experiments.config.schema import ConfigError, OffloadDevice, Profile
from zi_experiments.cost_model.inventory import Home, Stored
from zi_experiments.cost_model.plan import (
    ELEMENT_BYTES,
    Overlap,
    Plan,
    Storage,
    placement_of,
)
from zi_experiments.models.architecture import Parameter

MIN_SWAP_BYTES = 1 << 20  # DeepSpeed keeps smaller parameters in memory
OVERLAP = {
    Profile.tuned: Overlap(hidden=0.95, launch=2.5, stall=1.6, load_s=2.0, load_s_per_parameter=2e-10),
    # a hook, a fetch and a wait for every submodule, with nothing on its way meanwhile
    Profile.reference: Overlap(hidden=1.0, launch=14.0, stall=8.0, load_s=2.0, load_s_per_parameter=2e-10),
}

# without a GPU that would go on by itself, DeepSpeed waits for what it reads, and its kernel to expand weights is CUDA's
CPU_HIDDEN, CPU_EXPAND = 0.0, {Profile.tuned: 1.5, Profile.reference: 1.8}


def storage(plan: Plan) -> Storage:
    """Where DeepSpeed keeps the weights. Raises `ConfigError` when it has no room for its own NVMe buffers."""
    placement, buffers = placement_of(stored(plan)), buffer_bytes_host(plan)
    if buffers > plan.machine.host_memory_bytes:
        profile = (
            "" if plan.run.engine.profile is Profile.tuned else ", or engine.profile=tuned, which computes smaller ones"
        )
        raise ConfigError(
            f"{buffer_count(plan)} NVMe buffers of {buffer_numel(plan)} elements take {buffers / 1e9:.1f} GB of host memory "
            f"and {plan.machine.host_memory_bytes / 1e9:.1f} GB are available: pass a smaller offload.buffer_count{profile}"
        )
    offloaded = plan.run.offload.device is not OffloadDevice.none
    return Storage(
        placement=placement,
        # on a CPU there is no link to cross
        streamed_bytes_per_pass=placement.cpu_bytes + placement.nvme_bytes
        if offloaded and plan.machine.device == "cuda"
        else 0,
        host_buffer_bytes=buffers,
        gpu_buffer_bytes=plan.expanded_bytes + (2 * plan.layer_numel * ELEMENT_BYTES if offloaded else 0),
        locked_bytes=buffers,
        overlap=_overlap(plan),
    )


def _overlap(plan: Plan) -> Overlap:
    profile = plan.run.engine.profile or Profile.tuned
    if plan.machine.device == "cuda":
        return OVERLAP[profile]
    return replace(OVERLAP[profile], hidden=CPU_HIDDEN, expand=CPU_EXPAND[profile])


def persistence_numel(plan: Plan) -> int:
    """Parameters of at most this many stored elements stay on the GPU."""
    if plan.run.engine.profile is Profile.reference:
        return plan.architecture.hidden_size
    # biases and norms: copying each on demand costs more than its bytes
    return max((p.numel for p in plan.architecture.parameters if len(p.shape) == 1), default=0)


def swap_block_bytes(plan: Plan) -> int:
    """Block size of asynchronous I/O."""
    reference = 16 * MIN_SWAP_BYTES
    default = reference if plan.run.engine.profile is Profile.reference else MIN_SWAP_BYTES
    return plan.run.offload.aio.block_size or default


def swapped(plan: Plan) -> list[Parameter]:
    """The parameters that DeepSpeed puts on disk: those whose partition is at least a block and 1 MiB."""
    if plan.run.offload.device is not OffloadDevice.nvme:
        return []
    smallest, ranks = max(MIN_SWAP_BYTES, swap_block_bytes(plan)), plan.run.hardware.num_gpus
    return [p for p in plan.architecture.parameters if ceil(plan.stored_numel(p) / ranks) * ELEMENT_BYTES >= smallest]


def stored(plan: Plan) -> dict[str, Stored]:
    """Every parameter by name: large ones where `offload` says, small ones on the device that computes."""
    on_disk, most = {p.name for p in swapped(plan)}, persistence_numel(plan)
    offloaded = plan.run.offload.device is not OffloadDevice.none

    def home(p: Parameter) -> Home:
        if p.name in on_disk:
            return Home.nvme
        return Home.cpu if offloaded and plan.stored_numel(p) > most else plan.device_home

    return {p.name: Stored(numel=plan.stored_numel(p), home=home(p)) for p in plan.architecture.parameters}


def buffer_numel(plan: Plan) -> int:
    """Elements of one NVMe buffer: the largest partition on disk."""
    if plan.run.offload.buffer_size is not None:
        return plan.run.offload.buffer_size
    if plan.run.engine.profile is Profile.reference:
        return _reference_buffers(plan)[1]
    ranks = plan.run.hardware.num_gpus
    return max((ceil(plan.stored_numel(p) / ranks) for p in swapped(plan)), default=MIN_SWAP_BYTES)


def buffer_count(plan: Plan) -> int:
    """NVMe buffers: two layers' parameters, so that one is read while the other is used, and the rest of the model."""
    if plan.run.offload.buffer_count is not None:
        return plan.run.offload.buffer_count
    if plan.run.engine.profile is Profile.reference:
        return _reference_buffers(plan)[0]
    layers = Counter(p.layer for p in swapped(plan))
    outside = layers.pop(None, 0)
    return 2 * max(layers.values(), default=0) + outside + 1


def _reference_buffers(plan: Plan) -> tuple[int, int]:
    """Count and size, in elements, that the reference script uses."""
    if plan.architecture.model_type == "bloom":
        return (3, 8 << 30) if plan.run.offload.use_gds else (5, 9 << 30)
    if plan.architecture.model_type == "mixtral":
        return (10, 1 << 30)
    return (5, 2 << 30)


def buffer_bytes_host(plan: Plan) -> int:
    """Host memory of the NVMe buffers, over all ranks; with GPUDirect Storage they are on the GPU."""
    if not swapped(plan) or plan.run.offload.use_gds:
        return 0
    return buffer_numel(plan) * buffer_count(plan) * ELEMENT_BYTES * plan.run.hardware.num_gpus


def live_layers(plan: Plan) -> int:
    """Decoder layers that may be on the GPU at once: the one that computes and those on their way."""
    layer = plan.layer_numel * ELEMENT_BYTES
    memory = plan.machine.gpu_memory_bytes
    if memory is None:
        return 4
    room = memory - plan.kv_cache_bytes - plan.outside_numel * ELEMENT_BYTES
    return max(2, min(4, room // (2 * layer)))
