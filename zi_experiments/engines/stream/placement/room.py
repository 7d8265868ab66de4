"""The room that there is for weights on the device and in host memory, and what buffers take of it."""

from collections import Counter
from collections.abc import Sequence

from zi_experiments.config.schema import CacheDevice, OffloadDevice, Verify
from zi_experiments.cost_model.spec import ELEMENT_BYTES, Spec
from zi_experiments.engines.stream import expert_share, host_share, routing, sharing
from zi_experiments.engines.stream.placement.parts import LayerPlacement, expanded_elements, largest_slab

USUAL_SLOTS, SLOTS_BESIDE_HOST = 3, 6
OWN_SLOTS = (
    2  # of a ring for weights that are not experts: one is ready, one is being filled; a layer computes from a copy
)
BUFFERS = 4  # of one slab each, in host memory in front of the GPU's slots, when slabs come from disk
PARALLEL = 4  # requests for one slab at a time, unless offload.aio.intra_op_parallelism sets another number


def is_routed(spec: Spec, placed: Sequence[LayerPlacement]) -> bool:
    """Return whether decode steps bring routed experts only: then no other weights cross together with experts."""
    streamed = [layer.streamed for layer in placed]
    copies = spec.machine.device == "cuda" and routing.stacks(streamed)
    reads = spec.run.offload.device is OffloadDevice.nvme
    # what is neither read, nor crosses, nor is expanded costs nothing
    saves = spec.experts_are_quantized or bool(copies) or reads or expert_share.asked(spec) > 0
    return saves and routing.pays(spec) and all(layer.in_parts or not layer.streamed.own_bytes for layer in placed)


def own_slot_bytes(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return the most bytes of a layer's weights that routed passes bring beside experts; 0: all of these are there."""
    return max(layer.streamed.own_bytes for layer in placed) if is_routed(spec, placed) else 0


def steps_in_place(spec: Spec, placed: Sequence[LayerPlacement]) -> bool:
    """Return whether decode steps copy nothing, or only what has a fixed place on the device, and experts."""
    return is_routed(spec, placed) or not any(layer.streamed.nbytes for layer in placed)


def slots(spec: Spec) -> int:
    """Return the number of slots: one computes, one is being filled and, unless memory is scarce, one is ready.

    More are ready beside layers on the host: while it computes one, the link brings as many others as there are slots. They
    have half of the room where no layers stay on the GPU.
    """
    if spec.run.offload.resident == "auto":
        return 2
    if not host_share.layers(spec) or spec.run.offload.resident:
        return USUAL_SLOTS
    sizes = Counter[int | None]()
    for parameter in spec.architecture.parameters:
        sizes[parameter.layer] += ELEMENT_BYTES * spec.stored_numel(parameter)
    del sizes[None]
    return max(USUAL_SLOTS, min(SLOTS_BESIDE_HOST, device_room(spec) // 2 // max(sizes.values())))


def expert_slots(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return how many experts have a place on the GPU, copied there when they are needed; 0: none is copied alone."""
    if spec.machine.device == "cpu" or not is_routed(spec, placed):
        return 0
    resident, streamed = sum(layer.resident.nbytes for layer in placed), [layer.streamed for layer in placed]
    if spec.run.offload.resident == "auto":
        return routing.slots(spec, streamed, device_room(spec) - resident - ring_bytes(spec, placed))
    total = resident + sum(layer.nbytes for layer in streamed)
    return routing.slots(spec, streamed, int(spec.run.offload.resident * total) - resident)


def host_slots(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return how many experts that are on disk have a place in host memory; 0: none is read alone."""
    streamed = [layer.streamed for layer in placed if layer.on_disk]
    if not streamed or not is_routed(spec, placed):
        return 0
    return routing.slots(spec, streamed, host_room(spec, placed) if spec.run.offload.resident == "auto" else 0)


def device_room(spec: Spec) -> int:
    """Return the bytes of one device that are left for resident layers and their buffers."""
    machine = spec.machine
    outside = outside_bytes(spec)
    if machine.gpu_memory_bytes is None:
        own = spec.host_memory_bytes * 9 // 10 // spec.run.hardware.num_gpus
        return own - outside - spec.kv_cache_bytes - spec.reference_bytes
    on_gpu = spec.run.kv_cache.device is CacheDevice.gpu
    hosted = host_share.kv_bytes(spec, host_share.layers(spec))
    kv = spec.kv_cache_bytes - hosted if on_gpu else spec.kv_slot_bytes
    kv = spec.of_one_rank(kv + (spec.kv_slot_bytes if hosted else 0))
    # no room for the reference: weights are parked meanwhile, so the same layers are resident with verify=off
    return (
        machine.gpu_memory_bytes - spec.context_bytes - outside - max(kv + spec.workspace_bytes, spec.observing_bytes)
    )


def outside_bytes(spec: Spec) -> int:
    """Return the bytes of embeddings, head and final norm, which stay on the device in 16 bits."""
    return ELEMENT_BYTES * sum(p.numel for p in spec.architecture.parameters if p.layer is None)


def excess(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return the bytes by which resident weights and buffers exceed the device's memory; negative if they fit."""
    return sum(layer.resident.nbytes for layer in placed) + buffer_bytes(spec, placed) - device_room(spec)


def buffer_bytes(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return the bytes of all buffers on the device."""
    experts = expert_slots(spec, placed) * routing.slot_bytes([layer.streamed for layer in placed])
    return ring_bytes(spec, placed) + experts


def ring_bytes(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return the bytes of the slots for layers, and of the buffers that weights are expanded into or gathered in."""
    expert, gathered = routing.slot_bytes([layer.streamed for layer in placed]), 0
    if expert and not spec.experts_are_quantized and is_routed(spec, placed):
        gathered = expert * routing.at_once(spec, expert)
    return ring_slot_bytes(spec, placed) + ELEMENT_BYTES * expanded_elements(placed) + gathered


def ring_slot_bytes(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return the bytes of the slots for slabs, for shares of them, and for what is not an expert."""
    largest, own = largest_slab(placed), (OWN_SLOTS + 1) * own_slot_bytes(spec, placed)
    return slots(spec) * largest + sharing.share_slots(spec) * largest // sharing.sharers(spec) + own


def parked_bytes(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return how many resident bytes leave the GPU for the reference: for its weights, and as much to quantize them.

    The buffer that layers are expanded into makes room as well, and so does what a measured pass would take.
    """
    memory = spec.machine.gpu_memory_bytes
    if memory is None or spec.run.verify is Verify.off:
        return 0
    resident, arriving = sum(layer.resident.nbytes for layer in placed), ring_slot_bytes(spec, placed)
    free = memory - spec.context_bytes - outside_bytes(spec) - resident - arriving - spec.observing_kv_bytes
    return min(resident, max(0, spec.observed_bytes + 2 * spec.reference_bytes - free))


def host_room(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return the bytes of host memory, of each machine, beside the buffers in front of the disk."""
    own = own_slot_bytes(spec, placed)
    beside = BUFFERS * (largest_slab(placed) + own)
    if spec.machine.device == "cpu":
        expanded = spec.ranks_each * (ELEMENT_BYTES * expanded_elements(placed) + own)
        return device_room(spec) - sum(layer.resident.nbytes for layer in placed) - beside - expanded
    beside += spec.kv_cache_bytes // spec.run.launch.nnodes if spec.run.kv_cache.device is CacheDevice.cpu else 0
    beside += spec.process_bytes // spec.run.launch.nnodes + spec.ranks_each * parked_bytes(spec, placed)
    return spec.machine.host_memory_bytes * 8 // 10 - beside
