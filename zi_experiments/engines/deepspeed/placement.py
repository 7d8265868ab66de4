"""What ZeRO stage 3 does with the weights of a plan: what stays on the GPU, what is swapped, which buffers. Pure figures."""

from collections import Counter
from dataclasses import replace
from math import ceil

from zi_experiments.config.schema import ConfigError, OffloadDevice, Profile
from zi_experiments.cost_model.inventory import Home, Stored
from zi_experiments.cost_model.plan import Overlap, Storage, placement_of
from zi_experiments.cost_model.spec import ELEMENT_BYTES, Spec
from zi_experiments.models.architecture import Parameter
from zi_experiments.units import gigabytes

MIN_SWAP_BYTES = 1 << 20  # DeepSpeed keeps smaller parameters in memory
OVERLAP = {
    Profile.tuned: Overlap(hidden=0.95, launch=2.5, stall=1.6, load_s=2.0, load_s_per_parameter=2e-10),
    # a hook, a fetch and a wait for every submodule, with nothing on its way meanwhile
    Profile.reference: Overlap(hidden=1.0, launch=14.0, stall=8.0, load_s=2.0, load_s_per_parameter=2e-10),
}

# without a GPU that would go on by itself, DeepSpeed waits for what it reads, and its kernel to expand weights is CUDA's
CPU_HIDDEN, CPU_EXPAND = 0.0, {Profile.tuned: 1.5, Profile.reference: 1.8}


def storage(spec: Spec) -> Storage:
    """Where DeepSpeed keeps the weights. Raises `ConfigError` when it has no room for its own NVMe buffers."""
    placement, buffers = placement_of(stored(spec)), buffer_bytes_host(spec)
    if buffers > spec.machine.host_memory_bytes:
        profile = (
            "" if spec.run.engine.profile is Profile.tuned else ", or engine.profile=tuned, which computes smaller ones"
        )
        raise ConfigError(
            f"{buffer_count(spec)} NVMe buffers of {buffer_numel(spec)} elements take {gigabytes(buffers, 1)} of host memory "
            f"and {gigabytes(spec.machine.host_memory_bytes, 1)} are available: pass a smaller offload.buffer_count{profile}"
        )
    offloaded = spec.run.offload.device is not OffloadDevice.none
    return Storage(
        placement=placement,
        # on a CPU there is no link to cross
        streamed_bytes_per_pass=placement.cpu_bytes + placement.nvme_bytes
        if offloaded and spec.machine.device == "cuda"
        else 0,
        host_buffer_bytes=buffers,
        gpu_buffer_bytes=spec.expanded_bytes + (2 * spec.layer_numel * ELEMENT_BYTES if offloaded else 0),
        locked_bytes=buffers,
        pins_by_default=spec.run.engine.profile is not Profile.reference,
        overlap=_overlap(spec),
    )


def _overlap(spec: Spec) -> Overlap:
    profile = spec.run.engine.profile or Profile.tuned
    if spec.machine.device == "cuda":
        return OVERLAP[profile]
    return replace(OVERLAP[profile], hidden=CPU_HIDDEN, expand=CPU_EXPAND[profile])


def persistence_numel(spec: Spec) -> int:
    """Parameters of at most this many stored elements stay on the GPU."""
    if spec.run.engine.profile is Profile.reference:
        return spec.architecture.hidden_size
    # biases and norms: copying each on demand costs more than its bytes
    return max((p.numel for p in spec.architecture.parameters if len(p.shape) == 1), default=0)


def swap_block_bytes(spec: Spec) -> int:
    """Block size of asynchronous I/O."""
    reference = 16 * MIN_SWAP_BYTES
    default = reference if spec.run.engine.profile is Profile.reference else MIN_SWAP_BYTES
    return spec.run.offload.aio.block_size or default


def swapped(spec: Spec) -> list[Parameter]:
    """The parameters that DeepSpeed puts on disk: those whose partition is at least a block and 1 MiB."""
    if spec.run.offload.device is not OffloadDevice.nvme:
        return []
    smallest, ranks = max(MIN_SWAP_BYTES, swap_block_bytes(spec)), spec.run.hardware.num_gpus
    return [p for p in spec.architecture.parameters if ceil(spec.stored_numel(p) / ranks) * ELEMENT_BYTES >= smallest]


def stored(spec: Spec) -> dict[str, Stored]:
    """Every parameter by name: large ones where `offload` says, small ones on the device that computes."""
    on_disk, most = {p.name for p in swapped(spec)}, persistence_numel(spec)
    offloaded = spec.run.offload.device is not OffloadDevice.none

    def home(p: Parameter) -> Home:
        if p.name in on_disk:
            return Home.nvme
        return Home.cpu if offloaded and spec.stored_numel(p) > most else spec.device_home

    return {p.name: Stored(numel=spec.stored_numel(p), home=home(p)) for p in spec.architecture.parameters}


def buffer_numel(spec: Spec) -> int:
    """Elements of one NVMe buffer: the largest partition on disk."""
    if spec.run.offload.buffer_size is not None:
        return spec.run.offload.buffer_size
    if spec.run.engine.profile is Profile.reference:
        return _reference_buffers(spec)[1]
    ranks = spec.run.hardware.num_gpus
    return max((ceil(spec.stored_numel(p) / ranks) for p in swapped(spec)), default=MIN_SWAP_BYTES)


def buffer_count(spec: Spec) -> int:
    """NVMe buffers: two layers' parameters, so that one is read while the other is used, and the rest of the model."""
    if spec.run.offload.buffer_count is not None:
        return spec.run.offload.buffer_count
    if spec.run.engine.profile is Profile.reference:
        return _reference_buffers(spec)[0]
    layers = Counter(p.layer for p in swapped(spec))
    outside = layers.pop(None, 0)
    return 2 * max(layers.values(), default=0) + outside + 1


def _reference_buffers(spec: Spec) -> tuple[int, int]:
    """Count and size, in elements, that the reference script uses."""
    if spec.architecture.model_type == "bloom":
        return (3, 8 << 30) if spec.run.offload.use_gds else (5, 9 << 30)
    if spec.architecture.model_type == "mixtral":
        return (10, 1 << 30)
    return (5, 2 << 30)


def buffer_bytes_host(spec: Spec) -> int:
    """Host memory of the NVMe buffers, over all ranks; with GPUDirect Storage they are on the GPU."""
    if not swapped(spec) or spec.run.offload.use_gds:
        return 0
    return buffer_numel(spec) * buffer_count(spec) * ELEMENT_BYTES * spec.run.hardware.num_gpus


def live_layers(spec: Spec) -> int:
    """Decoder layers that may be on the GPU at once: the one that computes and those on their way."""
    layer = spec.layer_numel * ELEMENT_BYTES
    memory = spec.machine.gpu_memory_bytes
    if memory is None:
        return 4
    room = memory - spec.kv_cache_bytes - spec.outside_numel * ELEMENT_BYTES
    return max(2, min(4, room // (2 * layer)))


def uses_cuda_quantizer(spec: Spec) -> bool:
    """Whether DeepSpeed expands the weights with its CUDA kernel, which knows float16 and groups of columns only."""
    quant = spec.run.quant
    if quant.group_size is None or spec.machine.device != "cuda":
        return False
    return spec.dtype == "float16" and quant.group_dim == 1 and quant.group_size % 8 == 0
