"""What a placement means for a plan: bytes in each memory and across each link, and notes."""

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

from zi_experiments.config.schema import CacheDevice
from zi_experiments.cost_model.plan import Overlap, Placement, Storage
from zi_experiments.cost_model.spec import ELEMENT_BYTES, Spec
from zi_experiments.engines.stream import expert_share, host_share, routing, sharing
from zi_experiments.engines.stream.placement import fitting, room
from zi_experiments.engines.stream.placement.parts import LayerPlacement, expanded_elements, largest_slab, layers_of
from zi_experiments.units import gigabytes

OVERLAP = Overlap(
    hidden=1.0,
    launch=1.55,
    launch_routed=0.98,
    choice=0.2,
    fetch=0.2,
    copy_s=4.8e-6,
    small_s=3.7e-5,
    small_routed_s=1e-4,
    packed=0.63,
    stall=0.0,
    load_s=0.9,
    load_s_per_parameter=3e-12,
    load_s_per_quantized=2e-11,
    pinning=3.0,
)
PACKED_TOKENS = 2  # more tokens share the work to expand weights
MOST_RECORDED = 8192  # tokens in the KV cache: a recorded step reads its whole room, whatever is used of it


def storage(spec: Spec, placed: Sequence[LayerPlacement]) -> Storage:
    """Return what each memory holds between passes, what a pass moves, and the notes for the plan."""
    ranks, on_gpu = spec.run.hardware.num_gpus, spec.machine.device == "cuda"
    resident = room.outside_bytes(spec) + sum(layer.resident.nbytes for layer in placed)
    host = sum(layer.streamed.nbytes for layer in placed if not layer.on_disk)
    disk = sum(layer.streamed.nbytes for layer in placed if layer.on_disk)
    largest = max((layer.streamed.nbytes for layer in placed if layer.on_disk), default=0)
    expanded = ELEMENT_BYTES * expanded_elements(placed)
    streamed, on_host = [layer.streamed for layer in placed], host_share.layers(spec)
    each = sharing.sharers(spec)
    holders = ranks // each  # of all weights: the machines, or all of them together
    brought = holders if sharing.gathers(spec) else ranks  # how often each weight crosses in a pass
    copied, read = room.expert_slots(spec, placed), room.host_slots(spec, placed)
    cached = read * routing.slot_bytes(streamed)
    own, own_slot = sum(layer.own_bytes for layer in streamed), room.own_slot_bytes(spec, placed)
    own = own if own_slot else 0
    host_experts, missed_bytes = _host_experts(spec, placed), routing.per_step(spec, streamed, copied)
    host_bytes = ceil(expert_share.part(spec, streamed, host_experts, copied) * missed_bytes) if copied else 0
    step_bytes = missed_bytes - host_bytes + own if copied else None
    if on_host and on_gpu:
        step_bytes = host + disk - sum(streamed[index].nbytes for index in on_host)
    routes, in_place = room.is_routed(spec, placed), room.steps_in_place(spec, placed)
    # slabs that have come when a prefill begins: none where steps between prompts bring experts only
    ahead = room.slots(spec) + sharing.share_slots(spec) if on_gpu and not routes else 0
    read_ahead, slab = ahead + room.BUFFERS if disk and not routes else 0, largest_slab(placed)
    return Storage(
        placement=Placement(
            gpu_bytes=resident if on_gpu else 0,
            cpu_bytes=host + (0 if on_gpu else resident),
            nvme_bytes=disk,
        ),
        copied_bytes=(ranks - 1) * resident,
        expanded_numel=sum(p.numel for p in spec.architecture.parameters if p.layer is None and spec.is_quantized(p)),
        streamed_bytes_per_pass=brought * (host + disk) if on_gpu else 0,
        ready_bytes=brought * ahead * slab,
        read_ahead_bytes=read_ahead * slab,
        each_machine_has_all=each == spec.ranks_each,
        gathered_bytes=(each - 1) * (host + disk) // each if on_gpu and sharing.gathers(spec) else 0,
        streamed_bytes_per_step=step_bytes,
        disk_bytes_per_step=routing.per_step(spec, streamed, copied, read) + own if read else None,
        own_bytes_per_step=own,
        can_compute_on_host=on_gpu and host > 0 and host_share.obstacle(spec) is None,
        host_layers=on_host,
        can_compute_experts_on_host=copied > 0 and expert_share.obstacle(spec) is None,
        host_experts=host_experts,
        host_bytes_per_step=host_bytes,
        host_kv_bytes=host_share.kv_bytes(spec, on_host) if on_gpu else 0,
        routes=routes,
        expert_bytes=routing.slot_bytes(streamed) if copied or read else 0,
        experts_together=routing.together(routing.slot_bytes(streamed)) if copied and not read else 1,
        packed_tokens=PACKED_TOKENS if on_gpu and in_place and _multiplies_packed(spec) else 0,
        recorded=on_gpu and in_place and _is_recorded(spec, routes),
        host_buffer_bytes=holders * (room.BUFFERS * (largest + (own_slot if largest else 0)) + cached)
        + (0 if on_gpu else ranks * (expanded + own_slot)),
        gpu_buffer_bytes=room.buffer_bytes(spec, placed) if on_gpu else 0,
        cached_bytes=copied * routing.slot_bytes(streamed),
        host_cached_bytes=holders * cached,
        parked_bytes=room.parked_bytes(spec, placed),
        notes=(*sharing.notes(spec), *_notes(spec, placed)),
        overlap=OVERLAP,
    )


def _host_experts(spec: Spec, placed: Sequence[LayerPlacement]) -> float:
    """Return the share of the host in the work of experts that are not on the device; 0 if that is less than an expert."""
    streamed, share = [layer.streamed for layer in placed], expert_share.asked(spec)
    if not room.is_routed(spec, placed) or not any(layout.experts for layout in streamed):
        return 0.0
    copied = room.expert_slots(spec, placed)
    return share if not copied or expert_share.part(spec, streamed, share, copied) else 0.0


def _too_small(spec: Spec) -> str | None:
    """Return why the host computes no expert although it could."""
    return "the share of the host is less than one of those that a layer brings" if expert_share.asked(spec) else None


def _unmeasured(spec: Spec) -> str | None:
    """Return why `auto` has chosen no share."""
    return "nobody has measured how fast the host computes" if spec.run.offload.compute == "auto" else None


def _multiplies_packed(spec: Spec) -> bool:
    """Return whether there is a kernel that multiplies weights as they are packed."""
    return spec.run.quant.is_quantized and not spec.run.quant.is_native


def _is_recorded(spec: Spec, is_routed: bool) -> bool:
    """Return whether a decode step's operations are the same for every token, as far as the architecture tells.

    Those of experts may depend on the router's choice, unless this engine computes them itself.
    """
    work, arch = spec.run.workload, spec.architecture
    if arch.is_routed and not is_routed:
        return False
    # a layer without states of its own reads those of another
    if not arch.kv_layers or arch.has_own_cache or not all(layer.elements_per_token for layer in arch.kv_layers):
        return False
    if any(layer.max_tokens is not None for layer in arch.kv_layers) and not windows_slide(arch.config):
        return False
    in_place = spec.run.kv_cache.device is CacheDevice.gpu and work.micro_batches == 1
    return in_place and work.sequences * (work.prompt_len + work.gen_len) <= MOST_RECORDED


def windows_slide(config: Any) -> bool:
    """Return whether what limits attention in some layers of a model are sliding windows: Llama 4 has chunks."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    return set(kinds) <= {"full_attention", "sliding_attention"}


def _notes(spec: Spec, placed: Sequence[LayerPlacement]) -> Iterator[str]:
    """Yield what the host computes of a decode step, or why nothing, and what the step brings of a mixture of experts."""
    if on_host := host_share.layers(spec):
        yield f"the host's cores compute {len(on_host)} of {len(placed)} layers in decode steps"
    if share := _host_experts(spec, placed):
        yield f"the host's cores compute experts beside the copies of others: {100 * share:.0f} % of those not on the GPU"
    elif spec.run.offload.compute != "gpu" and room.is_routed(spec, placed):
        if why := expert_share.obstacle(spec) or _too_small(spec) or _unmeasured(spec):
            yield f"all experts compute on the GPU: {why}"
    elif spec.run.offload.compute != "gpu" and (why := host_share.obstacle(spec) or _unmeasured(spec)):
        yield f"all layers compute on the GPU: {why}"
    if not spec.architecture.is_routed or not any(layer.streamed.nbytes for layer in placed):
        return
    if room.is_routed(spec, placed):
        needed = spec.distinct_experts(spec.run.workload.batch_size)
        yield f"a decode step brings about {needed:.0f} of {spec.experts} experts of a layer: those that tokens are routed to"
        if room.own_slot_bytes(spec, placed):
            own = gigabytes(sum(layer.streamed.own_bytes for layer in placed))
            there = "on the GPU" if spec.machine.device == "cuda" else "in memory"
            yield f"{own} of the other weights do not fit {there}: every step brings them, a prompt brings whole layers"
        if cached := room.host_slots(spec, placed):
            of = sum(stack.count for stack in routing.stacks([layer.streamed for layer in placed]))
            yield f"host memory has room for {cached} of {of} experts; the others are read when tokens are routed to them"
    elif spec.machine.device == "cuda":
        why = routing.obstacle(spec)
        if why is None:
            fits = fitting.in_parts(spec, layers_of(spec)) is not None
            why = "that is predicted to be faster" if fits else "the GPU has no room for single ones"
        yield f"a decode step brings all experts of a layer: {why}"
