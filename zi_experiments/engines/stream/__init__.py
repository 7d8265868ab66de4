"""Layer streaming: whole decoder layers are copied to the device through a ring of slots, ahead of the compute.

docs/stream.md has a picture of it.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zi_experiments.config.schema import Run, Verify
from zi_experiments.cost_model.inventory import Home, Inventory, Stored, held, home_on
from zi_experiments.cost_model.plan import Plan, Storage
from zi_experiments.cost_model.spec import ELEMENT_BYTES, Spec
from zi_experiments.engines.disk_access import reading
from zi_experiments.engines.hf_session import HFSession
from zi_experiments.engines.modules import device_of, names_of, put
from zi_experiments.engines.stream import routing, sharing
from zi_experiments.engines.stream.placement import choice, parts, room
from zi_experiments.models import weights
from zi_experiments.models.packing import Code
from zi_experiments.models.structure import decoder_layers
from zi_experiments.runtime import distributed
from zi_experiments.runtime.progress import Progress
from zi_experiments.system import machines, toolchain
from zi_experiments.system.disk import Disk

OPTIONS = frozenset(
    {
        "offload.resident",
        "offload.compute",
        "offload.aio.block_size",
        "offload.aio.intra_op_parallelism",
        "workload.micro_batches",
        "hardware.cpu_threads",
    }
)
CONFIG_NAME = "engine_config"
SWITCH_S = 1e-4  # for a thread that launches to let the one that computes on the host go on: the usual 5 ms are a layer


def check(run: Run) -> None:
    """Raise nothing: the engine supports all settings."""


def storage(spec: Spec) -> Storage:
    """Return where the slabs are, and the buffers that they pass through."""
    return choice.storage(spec)


def stored(plan: Plan) -> dict[str, Stored]:
    """Return how each parameter is stored, by name."""
    return choice.stored(plan)


def requirements(plan: Plan) -> Iterator[str]:
    """Yield what Triton lacks to compile the kernels that quantized weights and what the host computes need on a GPU.

    Also what verification lacks.
    """
    if plan.machine.device == "cuda" and (plan.run.quant.is_quantized or plan.storage.uses_host):
        need = "Triton compiles the kernel that "
        need += "expands quantized weights" if plan.run.quant.is_quantized else "reads what the host computes"
        yield from toolchain.lacking(need, toolchain.c_compiler(), toolchain.python_headers())
    if (
        plan.run.verify is Verify.on
        and any(one.code is Code.signed for one in plan.formats)
        and not find_spec("compressed_tensors")
    ):
        yield "transformers verifies this format with compressed-tensors: pip install compressed-tensors"


def disk_access(run: Run, folders: Sequence[Path]) -> Disk:
    """Return how a run reads from `folders`: each host buffer by several requests at a time."""
    aio = run.offload.aio
    return reading(folders, aio.block_size, (aio.intra_op_parallelism or room.PARALLEL) * room.BUFFERS)


def config(plan: Plan, scratch: Sequence[str]) -> dict[str, Any]:
    """Return figures derived from the plan; `scratch` has the run's own folders on disk."""
    placed = choice.place(plan)
    return {
        "slots": room.slots(plan),
        "share_slots": sharing.share_slots(plan),
        "slot_bytes": max(layer.streamed.nbytes for layer in placed),
        "resident_bytes": sum(layer.resident.nbytes for layer in placed),
        "workspace_bytes": plan.workspace_bytes,
        "layers_on_disk": sum(layer.on_disk for layer in placed),
        "host_layers": list(plan.storage.host_layers),
        "host_experts": plan.storage.host_experts,
        "most_routed_tokens": routing.most_tokens(plan) if plan.storage.routes else 0,
        "expert_slots": room.expert_slots(plan, placed),
        "expert_host_slots": room.host_slots(plan, placed),
        "own_slot_bytes": room.own_slot_bytes(plan, placed),
        "folders": list(scratch),
    }


def prepare(plan: Plan, progress: Progress) -> None:
    distributed.init(plan.machine.device)


def load(plan: Plan, config: dict[str, Any], progress: Progress) -> HFSession:
    """Load the planned model: resident weights onto the device, streamed weights into slabs. Return its session."""
    import torch

    from zi_experiments.engines.stream import host_cache, own_weights
    from zi_experiments.engines.stream.device_kv_cache import make_cache
    from zi_experiments.engines.stream.host_crossing import Crossing
    from zi_experiments.engines.stream.host_layers import HostLayer
    from zi_experiments.engines.stream.layers import StreamedLayer
    from zi_experiments.engines.stream.loading import Loader
    from zi_experiments.engines.stream.parking import parked
    from zi_experiments.engines.stream.short_passes import ShortPasses

    device, dtype = device_of(plan), getattr(torch, plan.dtype)
    placed = choice.place(plan)
    if plan.storage.uses_host:
        _use_cores(plan)
    paths = [Path(folder) / f"rank{distributed.rank()}" for folder in config["folders"]]
    progress.begin("load", plan.weight_bytes, "bytes")
    with ExitStack() as stack, torch.no_grad():
        values = stack.enter_context(closing(weights.of(plan.run.weights, plan.architecture.config, dtype)))
        model = weights.empty_model(values, plan.architecture.config, dtype, device)
        loader = stack.enter_context(closing(Loader(plan, values, device, progress)))
        names = {first: [first, *others] for first, *others in names_of(model)}
        for name, value in loader.outside():
            put(model, names[name], value)
        prefix, modules = decoder_layers(model)
        resident = [loader.resident(f"{prefix}.{index}", layer) for index, layer in enumerate(placed)]
        streamed = [index for index, layer in enumerate(placed) if layer.streamed.nbytes]
        cache = host_cache.planned(plan)
        store = loader.store({f"{prefix}.{index}": placed[index] for index in streamed}, paths, cache)
        # allocated last: until here, quantizing weights takes this room
        expanded = torch.empty(parts.expanded_elements(placed), dtype=dtype, device=device)
    source: Any = _source(plan, store, streamed, device) if streamed else None
    own = own_weights.planned(plan, store, device)
    on_host, micro_batches, crossing = plan.storage.host_layers, plan.run.workload.micro_batches, Crossing(device)
    layers = []
    for index, module in enumerate(modules):
        host = None
        if index in on_host:
            slab, layout = store.slab(streamed.index(index)), placed[index].streamed
            host = HostLayer(module, index, slab, layout, dtype, crossing, micro_batches, device)
        layer = StreamedLayer(module, placed[index], resident[index], expanded, micro_batches, host)
        layers.append(layer)
        if index in streamed:
            layer.attach(source, streamed.index(index), min(on_host, default=0))
    short = None
    if plan.storage.routes or plan.storage.packed_tokens or plan.storage.recorded or on_host:
        short = ShortPasses(plan, layers, store, streamed, cache, own, device)
    kv_cache: Any = make_cache(plan, device)
    if short and plan.storage.recorded:
        short.record(model, kv_cache)
    progress.end()
    homes = dict(zip(streamed, (home for home, _ in store.pieces()), strict=True))

    if on_host:
        model.register_forward_pre_hook(lambda *_: crossing.begin())
        model.register_forward_hook(lambda *_: crossing.finish())

    def close() -> None:
        crossing.close()
        store.close()

    def aside() -> AbstractContextManager[None]:
        buffers = [expanded, *(short.give_up() if short else [])]
        return parked(buffers, resident, plan.storage.parked_bytes)

    return HFSession(
        model,
        device,
        kv_cache,
        inventory=partial(_inventory, plan, model, prefix, layers, homes, store),
        parked=aside,
        short=short,
        close=close,
    )


def _use_cores(plan: Plan) -> None:
    """Compute on the cores near the GPU, and have the slabs in memory near them: the first to write to a page decides."""
    import torch

    hardware, on_gpu = plan.run.hardware, plan.machine.device == "cuda"
    if on_gpu and plan.machine.cores:
        os.sched_setaffinity(0, plan.machine.cores)
        sys.setswitchinterval(SWITCH_S)
    if on_gpu or hardware.cpu_threads:
        torch.set_num_threads(machines.cpu_threads(hardware, plan.machine))


def _inventory(plan: Plan, model: Any, prefix: str, layers: list[Any], homes: dict[int, Home], store: Any) -> Inventory:
    """Return what this rank holds: weights outside the layers, resident slabs, its shares of the streamed slabs."""
    times = Counter(p for layer in layers for p in layer.parameters())
    shared = {p for p, count in times.items() if count > 1}
    outside = {name: p for name, p in model.named_parameters() if p in shared or not name.startswith(f"{prefix}.")}
    stored = {name: Stored(numel=p.numel(), home=home_on(p.device)) for name, p in outside.items()}
    slabs = [layer.resident for layer in layers]
    pieces = [*((home_on(tensor.device), tensor.nbytes) for tensor in (*outside.values(), *slabs)), *store.pieces()]
    own = sum(p.numel() for p in outside.values())
    for index, layer in enumerate(layers):
        for name, numel, stays in layer.held(shared):
            stored[f"{prefix}.{index}.{name}"] = Stored(
                numel=numel, home=home_on(layer.resident.device) if stays else homes[index]
            )
            own += numel if stays else numel // sharing.sharers(plan)
    return Inventory(parameters=stored, held=held(pieces, ELEMENT_BYTES * own))


def _sharers_group(ranks: int) -> Any:
    """Return the group of so many consecutive ranks that this one is in; all ranks call this."""
    import torch

    firsts = range(0, distributed.ranks(), ranks)
    groups = {first: torch.distributed.new_group(list(range(first, first + ranks))) for first in firsts}
    return groups[distributed.rank() // ranks * ranks]


def _source(plan: Plan, store: Any, streamed: list[int], device: Any) -> Any:
    from zi_experiments.engines.stream.ring import InPlace, Ring, Shares

    if shares := sharing.share_slots(plan):
        return Ring(
            Shares(store, shares, device), room.slots(plan), device, group=_sharers_group(sharing.sharers(plan))
        )
    in_steps = [number for number, index in enumerate(streamed) if index not in plan.storage.host_layers]
    if device.type == "cpu":
        return InPlace(store, in_steps)
    return Ring(store, room.slots(plan), device, wraps=not plan.storage.routes, in_steps=in_steps)
