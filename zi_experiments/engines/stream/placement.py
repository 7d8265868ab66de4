"""Which weights stay on the device, which are streamed, and from where. Figures only."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import groupby
from math import ceil
from typing import Any

from zi_experiments.config.schema import CacheDevice, OffloadDevice, Verify
from zi_experiments.cost_model.inventory import Home, Stored
from zi_experiments.cost_model.plan import Overlap, Placement, Plan, Storage
from zi_experiments.cost_model.prediction import Prediction, predict
from zi_experiments.cost_model.spec import ELEMENT_BYTES, Spec
from zi_experiments.engines.stream import expert_share, host_share, routing, sharing
from zi_experiments.engines.stream.slab import Layout, lay_out
from zi_experiments.models.architecture import Parameter
from zi_experiments.models.packing import Packing
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
OWN_SLOTS = (
    2  # of a ring for weights that are not experts: one is ready, one is being filled; a layer computes from a copy
)
BUFFERS = 4  # of one slab each, in host memory in front of the GPU's slots, when slabs come from disk
PARALLEL = 4  # requests for one slab at a time, unless offload.aio.intra_op_parallelism sets another number


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlacement:
    """Where the weights of one decoder layer are between passes."""

    resident: Layout  # stays on the device
    streamed: Layout  # is copied to the device in every pass
    on_disk: bool  # whether `streamed` is on disk, and not in host memory
    in_parts: bool = False  # whether a routed pass brings experts of `streamed` alone, and its other weights alone


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Layer:
    """The parameters of equal decoder layers: most models have one kind."""

    parameters: tuple[tuple[str, Parameter], ...]  # of the first such layer, with their names in it
    stored_bytes: dict[str, int]  # of each parameter, and of all experts together, the smallest first

    @property
    def experts(self) -> tuple[str, ...]:
        """The key of all experts together in `stored_bytes`, if the layer has experts."""
        return tuple(dict.fromkeys(_unit(name, p) for name, p in self.parameters if p.experts))

    @property
    def own_bytes(self) -> dict[str, int]:
        """`stored_bytes` without experts."""
        return {name: nbytes for name, nbytes in self.stored_bytes.items() if name not in self.experts}


def place(spec: Spec) -> tuple[LayerPlacement, ...]:
    """Return the placement of each decoder layer, in the order in which they run."""
    layers, on_host = _layers(spec), host_share.layers(spec)
    resident, sizes = spec.run.offload.resident, [layer.stored_bytes for layer in layers]
    if spec.run.offload.device is OffloadDevice.none:
        return _split(spec, layers, _evenly(sizes, 0, ()))
    if resident == "auto":
        whole = _fitting(spec, layers, on_host)
    else:
        total = sum(sum(layer.stored_bytes.values()) for layer in layers)
        whole = _split(spec, layers, _evenly(sizes, ceil((1 - resident) * total), on_host))
    if not routing.pays(spec) or (resident == "auto" and not any(layer.streamed.nbytes for layer in whole)):
        return whole
    parts = _in_parts(spec, layers)
    if parts is None or (own_slot_bytes(spec, parts) and not _is_faster(spec, parts, whole)):
        return whole
    return parts


def _in_parts(spec: Spec, layers: list[_Layer]) -> tuple[LayerPlacement, ...] | None:
    """Return the placement whose decode steps bring routed experts; None if it does not fit."""
    placed = _fitting(spec, layers, (), in_parts=True)
    return placed if _excess(spec, placed) <= 0 else None


def _fitting(
    spec: Spec, layers: list[_Layer], on_host: Collection[int], *, in_parts: bool = False
) -> tuple[LayerPlacement, ...]:
    """Return the placement that streams as little as possible or, if that does not fit either, everything.

    `in_parts` it streams all experts, and as little as possible of the other weights.
    """
    sizes = [layer.own_bytes if in_parts else layer.stored_bytes for layer in layers]
    total, needed = sum(sum(each.values()) for each in sizes), 0
    while True:
        streamed = _evenly(sizes, needed, on_host)
        if in_parts:
            streamed = [(*layer.experts, *own) for layer, own in zip(layers, streamed, strict=True)]
        placed = _split(spec, layers, streamed, in_parts=in_parts)
        excess = _excess(spec, placed)
        if excess <= 0 or needed >= total:
            return placed
        # streamed weights need slots, which take room from resident weights
        sent = sum(layer.streamed.own_bytes if in_parts else layer.streamed.nbytes for layer in placed)
        needed = min(total, sent + excess)


def _is_faster(spec: Spec, parts: tuple[LayerPlacement, ...], whole: tuple[LayerPlacement, ...]) -> bool:
    """Return whether a decode step of the first placement is predicted no slower; True where a rate is unknown."""
    first, second = (_predicted(spec, placed).decode_step_s for placed in (parts, whole))
    return first is None or second is None or first <= second


def _predicted(spec: Spec, placed: tuple[LayerPlacement, ...]) -> Prediction:
    known = {field.name: getattr(spec, field.name) for field in fields(Spec)}
    return predict(Plan(**known, storage=_storage(spec, placed), pin_memory=True))


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
    elif spec.run.offload.compute != "gpu" and is_routed(spec, placed):
        if why := expert_share.obstacle(spec):
            yield f"all experts compute on the GPU: {why}"
    elif spec.run.offload.compute != "gpu" and (why := host_share.obstacle(spec)):
        yield f"all layers compute on the GPU: {why}"
    if not spec.architecture.is_routed or not any(layer.streamed.nbytes for layer in placed):
        return
    if is_routed(spec, placed):
        needed = spec.distinct_experts(spec.run.workload.batch_size)
        yield f"a decode step brings about {needed:.0f} of {spec.experts} experts of a layer: those that tokens are routed to"
        if own_slot_bytes(spec, placed):
            own = gigabytes(sum(layer.streamed.own_bytes for layer in placed))
            there = "on the GPU" if spec.machine.device == "cuda" else "in memory"
            yield f"{own} of the other weights do not fit {there}: every step brings them, a prompt brings whole layers"
        if cached := host_slots(spec, placed):
            of = sum(stack.count for stack in routing.stacks([layer.streamed for layer in placed]))
            yield f"host memory has room for {cached} of {of} experts; the others are read when tokens are routed to them"
    elif spec.machine.device == "cuda":
        why = routing.obstacle(spec)
        if why is None:
            fits = _in_parts(spec, _layers(spec)) is not None
            why = "that is predicted to be faster" if fits else "the GPU has no room for single ones"
        yield f"a decode step brings all experts of a layer: {why}"


def expert_slots(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return how many experts have a place on the GPU, copied there when they are needed; 0: none is copied alone."""
    if spec.machine.device == "cpu" or not is_routed(spec, placed):
        return 0
    resident, streamed = sum(layer.resident.nbytes for layer in placed), [layer.streamed for layer in placed]
    if spec.run.offload.resident == "auto":
        return routing.slots(spec, streamed, _room(spec) - resident - _ring_bytes(spec, placed))
    total = resident + sum(layer.nbytes for layer in streamed)
    return routing.slots(spec, streamed, int(spec.run.offload.resident * total) - resident)


def _host_experts(spec: Spec, placed: Sequence[LayerPlacement]) -> float:
    """Return the share of the host in the work of experts that are not on the device."""
    away = is_routed(spec, placed) and any(layer.streamed.experts for layer in placed)
    return expert_share.asked(spec) if away else 0.0


def host_slots(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return how many experts that are on disk have a place in host memory; 0: none is read alone."""
    streamed = [layer.streamed for layer in placed if layer.on_disk]
    if not streamed or not is_routed(spec, placed):
        return 0
    return routing.slots(spec, streamed, _host_room(spec, placed) if spec.run.offload.resident == "auto" else 0)


def storage(spec: Spec) -> Storage:
    """Return where this engine keeps the weights. Each rank has its own copy of the resident ones."""
    return _storage(spec, place(spec))


def _storage(spec: Spec, placed: tuple[LayerPlacement, ...]) -> Storage:
    ranks, on_gpu = spec.run.hardware.num_gpus, spec.machine.device == "cuda"
    resident = _outside_bytes(spec) + sum(layer.resident.nbytes for layer in placed)
    host = sum(layer.streamed.nbytes for layer in placed if not layer.on_disk)
    disk = sum(layer.streamed.nbytes for layer in placed if layer.on_disk)
    largest = max((layer.streamed.nbytes for layer in placed if layer.on_disk), default=0)
    expanded = ELEMENT_BYTES * expanded_elements(placed)
    streamed, on_host = [layer.streamed for layer in placed], host_share.layers(spec)
    each = sharing.sharers(spec)
    holders = ranks // each  # of all weights: the machines, or all of them together
    brought = holders if sharing.gathers(spec) else ranks  # how often each weight crosses in a pass
    copied, read = expert_slots(spec, placed), host_slots(spec, placed)
    cached = read * routing.slot_bytes(streamed)
    packed = host_share.packed_bytes(spec, on_host)
    own, own_slot = sum(layer.own_bytes for layer in streamed), own_slot_bytes(spec, placed)
    own = own if own_slot else 0
    host_experts, missed_bytes = _host_experts(spec, placed), routing.per_step(spec, streamed, copied)
    host_bytes = ceil(expert_share.part(spec, streamed, host_experts, copied) * missed_bytes) if copied else 0
    step_bytes = missed_bytes - host_bytes + own if copied else None
    if host_experts:
        packed += expert_share.packed_bytes(spec, [index for index, layout in enumerate(streamed) if layout.experts])
    if on_host and on_gpu:
        step_bytes = host + disk - sum(streamed[index].nbytes for index in on_host)
    return Storage(
        placement=Placement(
            gpu_bytes=resident if on_gpu else 0,
            cpu_bytes=host + (0 if on_gpu else resident),
            nvme_bytes=disk,
        ),
        copied_bytes=(ranks - 1) * resident,
        expanded_numel=sum(p.numel for p in spec.architecture.parameters if p.layer is None and spec.is_quantized(p)),
        streamed_bytes_per_pass=brought * (host + disk) if on_gpu else 0,
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
        routes=is_routed(spec, placed),
        expert_bytes=routing.slot_bytes(streamed) if copied or read else 0,
        experts_together=routing.together(routing.slot_bytes(streamed)) if copied and not read else 1,
        packed_tokens=PACKED_TOKENS if on_gpu and steps_in_place(spec, placed) and _multiplies_packed(spec) else 0,
        recorded=on_gpu and steps_in_place(spec, placed) and _is_recorded(spec, is_routed(spec, placed)),
        host_buffer_bytes=holders * (BUFFERS * (largest + (own_slot if largest else 0)) + cached)
        + (0 if on_gpu else ranks * (expanded + own_slot))
        + packed,
        gpu_buffer_bytes=_buffer_bytes(spec, placed) if on_gpu else 0,
        cached_bytes=copied * routing.slot_bytes(streamed),
        host_cached_bytes=holders * cached,
        parked_bytes=_parked_bytes(spec, placed),
        notes=(*sharing.notes(spec), *_notes(spec, placed)),
        overlap=OVERLAP,
    )


def stored(spec: Spec) -> dict[str, Stored]:
    """Return how each parameter is stored, by name: 16-bit on the device outside the layers, else as `place` says."""
    placed, found = place(spec), {}
    for p in spec.architecture.parameters:
        if p.layer is None:
            found[p.name] = Stored(numel=p.numel, home=spec.device_home)
            continue
        layer = placed[p.layer]
        streamed = name_in_layer(p) in layer.streamed.names
        source = Home.nvme if layer.on_disk else Home.cpu
        found[p.name] = Stored(numel=spec.stored_numel(p), home=source if streamed else spec.device_home)
    return found


def name_in_layer(parameter: Parameter) -> str:
    """Return the name of a decoder layer's parameter within its layer."""
    return parameter.name.partition(f".{parameter.layer}.")[2]


def slots(spec: Spec) -> int:
    """Return the number of slots: one computes, one is being filled and, unless memory is scarce, one is ready."""
    return 2 if spec.run.offload.resident == "auto" else 3


def _layers(spec: Spec) -> list[_Layer]:
    """Return the decoder layers, in the order in which they run."""
    parameters = sorted((p for p in spec.architecture.parameters if p.layer is not None), key=lambda p: p.layer or 0)
    kinds: dict[tuple[tuple[str, tuple[int, ...], Packing | None], ...], _Layer] = {}
    layers = []
    for _, group in groupby(parameters, lambda p: p.layer):
        named = tuple((name_in_layer(p), p) for p in group)
        kind = tuple((name, p.shape, spec.packing(p)) for name, p in named)
        if kind not in kinds:
            sizes = Counter[str]()
            for name, p in named:
                sizes[_unit(name, p)] += ELEMENT_BYTES * spec.stored_numel(p)
            kinds[kind] = _Layer(parameters=named, stored_bytes=dict(reversed(sizes.most_common())))
        layers.append(kinds[kind])
    return layers


def _unit(name: str, parameter: Parameter) -> str:
    """Return what a parameter moves with: its own name in the layer, or its module's if it belongs to experts."""
    return name.rpartition(".")[0] if parameter.experts else name


def _outside_bytes(spec: Spec) -> int:
    """Return the bytes of embeddings, head and final norm, which stay on the device in 16 bits."""
    return ELEMENT_BYTES * sum(p.numel for p in spec.architecture.parameters if p.layer is None)


def _evenly(layers: list[dict[str, int]], needed: int, whole: Collection[int]) -> list[tuple[str, ...]]:
    """Return what each layer streams of `needed` bytes or more: a part of every one, so that slots are small.

    `layers` have the bytes of what may be streamed, the smallest first. The layers `whole` stream everything.
    """
    left = needed - sum(sum(layers[index].values()) for index in whole)
    parts, streamed, split, sent = len(layers) - len(whole), [], 0, 0
    for index, layer in enumerate(layers):
        if index in whole:
            streamed.append(tuple(layer))
            continue
        split += 1
        due = -(-max(0, left) * split // parts)
        streamed.append(tuple(_choose(layer, due - sent)))
        sent += sum(layer[name] for name in streamed[-1])
    return streamed


def _split(
    spec: Spec, layers: list[_Layer], streamed: list[tuple[str, ...]], *, in_parts: bool = False
) -> tuple[LayerPlacement, ...]:
    """Return the placements of layers that stream what is given by its names in `stored_bytes`."""

    @cache
    def with_streamed(layer: _Layer, chosen: tuple[str, ...]) -> LayerPlacement:
        packings = {p.name: packing for _, p in layer.parameters if (packing := spec.packing(p))}
        stays = [(name, p) for name, p in layer.parameters if _unit(name, p) not in chosen]
        goes = [(name, p) for name, p in layer.parameters if _unit(name, p) in chosen]
        return LayerPlacement(
            resident=lay_out(stays, packings),
            streamed=lay_out(goes, packings, shares=sharing.sharers(spec)),
            on_disk=False,
            in_parts=in_parts,
        )

    placed = [with_streamed(layer, chosen) for layer, chosen in zip(layers, streamed, strict=True)]
    if spec.run.offload.device is not OffloadDevice.nvme:
        return tuple(placed)
    sent = [index for index, layer in enumerate(placed) if layer.streamed.nbytes]
    in_memory = _fitting_host(spec, placed) if spec.run.offload.resident == "auto" else 0
    if in_memory < len(sent) and is_routed(spec, placed):
        in_memory = 0  # that room is a cache of experts
    # spread over the layers, so that the disk reads ahead steadily
    held = {index for i, index in enumerate(sent) if (i + 1) * in_memory // len(sent) > i * in_memory // len(sent)}
    return tuple(replace(layer, on_disk=index in sent and index not in held) for index, layer in enumerate(placed))


def _choose(layer: dict[str, int], bytes_due: int) -> Iterator[str]:
    """Yield names of parameters with `bytes_due` or more together: as few as possible, the last of the least size."""
    left = list(layer)
    while bytes_due > 0 and left:
        enough = (name for name in left if layer[name] >= bytes_due)
        chosen = next(enough, left[-1])
        left.remove(chosen)
        bytes_due -= layer[chosen]
        yield chosen


def _room(spec: Spec) -> int:
    """Return the bytes of one device that are left for resident layers and their buffers."""
    machine = spec.machine
    outside = _outside_bytes(spec)
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


def _parked_bytes(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return how many resident bytes leave the GPU for the reference: for its weights, and as much to quantize them.

    The buffer that layers are expanded into makes room as well, and so does what a measured pass would take.
    """
    memory = spec.machine.gpu_memory_bytes
    if memory is None or spec.run.verify is Verify.off:
        return 0
    resident, arriving = sum(layer.resident.nbytes for layer in placed), _slot_bytes(spec, placed)
    free = memory - spec.context_bytes - _outside_bytes(spec) - resident - arriving - spec.observing_kv_bytes
    return min(resident, max(0, spec.observed_bytes + 2 * spec.reference_bytes - free))


def _excess(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return the bytes by which resident weights and buffers exceed the device's memory; negative if they fit."""
    return sum(layer.resident.nbytes for layer in placed) + _buffer_bytes(spec, placed) - _room(spec)


def _buffer_bytes(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return the bytes of all buffers on the device."""
    experts = expert_slots(spec, placed) * routing.slot_bytes([layer.streamed for layer in placed])
    return _ring_bytes(spec, placed) + experts


def _ring_bytes(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return the bytes of the slots for layers, and of the buffers that weights are expanded into or gathered in."""
    expert, gathered = routing.slot_bytes([layer.streamed for layer in placed]), 0
    if expert and not spec.experts_are_quantized and is_routed(spec, placed):
        gathered = expert * routing.at_once(spec, expert)
    return _slot_bytes(spec, placed) + ELEMENT_BYTES * expanded_elements(placed) + gathered


def _slot_bytes(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return the bytes of the slots for slabs, for shares of them, and for what is not an expert."""
    largest, own = _largest(placed), (OWN_SLOTS + 1) * own_slot_bytes(spec, placed)
    return slots(spec) * largest + sharing.share_slots(spec) * largest // sharing.sharers(spec) + own


def _largest(placed: Sequence[LayerPlacement]) -> int:
    """Return the bytes of the largest streamed slab."""
    return max(layer.streamed.nbytes for layer in placed)


def expanded_elements(placed: Sequence[LayerPlacement]) -> int:
    """Return the 16-bit elements of the buffer that all quantized layers share: those of the largest layer."""
    return max(layer.resident.elements + layer.streamed.elements for layer in placed)


def _fitting_host(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return how many layers' streamed parts fit in host memory, beside the buffers for the others."""
    largest = _largest(placed)
    if spec.machine.device == "cpu" or not largest:
        return 0  # a CPU's resident weights already have that memory
    return min(sum(layer.streamed.nbytes > 0 for layer in placed), max(0, _host_room(spec, placed) // largest))


def _host_room(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return the bytes of host memory, of each machine, beside the buffers in front of the disk."""
    own = own_slot_bytes(spec, placed)
    beside = BUFFERS * (_largest(placed) + own)
    if spec.machine.device == "cpu":
        expanded = spec.ranks_each * (ELEMENT_BYTES * expanded_elements(placed) + own)
        return _room(spec) - sum(layer.resident.nbytes for layer in placed) - beside - expanded
    beside += spec.kv_cache_bytes // spec.run.launch.nnodes if spec.run.kv_cache.device is CacheDevice.cpu else 0
    beside += spec.process_bytes // spec.run.launch.nnodes + spec.ranks_each * _parked_bytes(spec, placed)
    return spec.machine.host_memory_bytes * 8 // 10 - beside
