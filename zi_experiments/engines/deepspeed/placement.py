"""Where ZeRO stage 3 keeps the weights of a plan (GPU, host memory or disk), and its buffers. Figures only."""

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
    # a hook, a fetch and a wait for every submodule, with no other copy in flight meanwhile
    Profile.reference: Overlap(hidden=1.0, launch=14.0, stall=8.0, load_s=2.0, load_s_per_parameter=2e-10),
}

# on a CPU nothing computes while DeepSpeed waits for a read, and its kernel that expands weights is not there
CPU_HIDDEN, CPU_EXPAND = 0.0, {Profile.tuned: 1.5, Profile.reference: 1.8}


def storage(spec: Spec) -> Storage:
    """Return where DeepSpeed keeps the weights. Raises `ConfigError` when NVMe buffers do not fit in host memory."""
    placement, buffers = placement_of(stored(spec)), buffer_bytes_host(spec)
    if buffers > spec.host_memory_bytes:
        profile = (
            "" if spec.run.engine.profile is Profile.tuned else ", or engine.profile=tuned, which computes smaller ones"
        )
        raise ConfigError(
            f"{buffer_count(spec)} NVMe buffers of {buffer_numel(spec)} elements take "
            f"{gigabytes(buffers // spec.run.launch.nnodes, 1)} of host memory "
            f"and {gigabytes(spec.machine.host_memory_bytes, 1)} are available: pass a smaller offload.buffer_count{profile}"
        )
    offloaded = spec.run.offload.device is not OffloadDevice.none
    return Storage(
        placement=placement,
        # on a CPU nothing crosses PCIe
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
    """Return the persistence threshold: parameters of at most this many stored elements stay on the GPU."""
    if spec.run.engine.profile is Profile.reference:
        return spec.architecture.hidden_size
    # biases and norms: a copy on demand costs more in overhead than in bytes
    return max((p.numel for p in spec.architecture.parameters if len(p.shape) == 1), default=0)


def swap_block_bytes(spec: Spec) -> int:
    """Return the block size of asynchronous I/O in bytes."""
    reference = 16 * MIN_SWAP_BYTES
    default = reference if spec.run.engine.profile is Profile.reference else MIN_SWAP_BYTES
    return spec.run.offload.aio.block_size or default


def swapped(spec: Spec) -> list[Parameter]:
    """Return the parameters that DeepSpeed puts on disk: those with partitions of at least a block and 1 MiB."""
    if spec.run.offload.device is not OffloadDevice.nvme:
        return []
    smallest, ranks = max(MIN_SWAP_BYTES, swap_block_bytes(spec)), spec.run.hardware.num_gpus
    return [p for p in spec.architecture.parameters if ceil(spec.stored_numel(p) / ranks) * ELEMENT_BYTES >= smallest]


def stored(spec: Spec) -> dict[str, Stored]:
    """Return how each parameter is stored, by name: large ones where `offload` says, small ones on the device."""
    on_disk, most = {p.name for p in swapped(spec)}, persistence_numel(spec)
    offloaded = spec.run.offload.device is not OffloadDevice.none

    def home(p: Parameter) -> Home:
        if p.name in on_disk:
            return Home.nvme
        return Home.cpu if offloaded and spec.stored_numel(p) > most else spec.device_home

    return {p.name: Stored(numel=spec.stored_numel(p), home=home(p)) for p in spec.architecture.parameters}


def buffer_numel(spec: Spec) -> int:
    """Return the elements of one NVMe buffer, by default those of the largest partition on disk."""
    if spec.run.offload.buffer_size is not None:
        return spec.run.offload.buffer_size
    if spec.run.engine.profile is Profile.reference:
        return _reference_buffers(spec)[1]
    ranks = spec.run.hardware.num_gpus
    return max((ceil(spec.stored_numel(p) / ranks) for p in swapped(spec)), default=MIN_SWAP_BYTES)


def buffer_count(spec: Spec) -> int:
    """Return the number of NVMe buffers, by default for two layers (one is used, one is read) and other weights."""
    if spec.run.offload.buffer_count is not None:
        return spec.run.offload.buffer_count
    if spec.run.engine.profile is Profile.reference:
        return _reference_buffers(spec)[0]
    layers = Counter(p.layer for p in swapped(spec))
    outside = layers.pop(None, 0)
    return 2 * max(layers.values(), default=0) + outside + 1


def _reference_buffers(spec: Spec) -> tuple[int, int]:
    """Return the count of buffers in the reference script, and their size in elements."""
    if spec.architecture.model_type == "bloom":
        return (3, 8 << 30) if spec.run.offload.use_gds else (5, 9 << 30)
    if spec.architecture.model_type == "mixtral":
        return (10, 1 << 30)
    return (5, 2 << 30)


def buffer_bytes_host(spec: Spec) -> int:
    """Return the bytes of all ranks' NVMe buffers in host memory; with GPUDirect Storage they are on the GPU."""
    if not swapped(spec) or spec.run.offload.use_gds:
        return 0
    return buffer_numel(spec) * buffer_count(spec) * ELEMENT_BYTES * spec.run.hardware.num_gpus


def live_layers(spec: Spec) -> int:
    """Return how many decoder layers may be on the GPU at once: the one that computes and those being fetched."""
    layer = spec.layer_numel * ELEMENT_BYTES
    memory = spec.machine.gpu_memory_bytes
    if memory is None:
        return 4
    room = memory - spec.kv_cache_bytes - spec.outside_numel * ELEMENT_BYTES
    return max(2, min(4, room // (2 * layer)))


def uses_cuda_quantizer(spec: Spec) -> bool:
    """Return whether DeepSpeed's CUDA kernel expands the weights: it knows float16 and groups of columns only."""
    quant = spec.run.quant
    if quant.group_size is None or spec.machine.device != "cuda":
        return False
    return spec.dtype == "float16" and quant.group_dim == 1 and quant.group_size % 8 == 0
