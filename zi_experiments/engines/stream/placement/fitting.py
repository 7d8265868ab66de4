"""What every layer streams, so that the rest fits on the device."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cache

from zi_experiments.config.schema import OffloadDevice
from zi_experiments.cost_model.spec import Spec
from zi_experiments.engines.stream import sharing
from zi_experiments.engines.stream.placement import room
from zi_experiments.engines.stream.placement.parts import Layer, LayerPlacement, largest_slab, unit
from zi_experiments.engines.stream.slab import lay_out


def in_parts(spec: Spec, layers: list[Layer]) -> tuple[LayerPlacement, ...] | None:
    """Return the placement whose decode steps bring routed experts; None if it does not fit."""
    placed = fit(spec, layers, (), in_parts=True)
    return placed if room.excess(spec, placed) <= 0 else None


def fit(
    spec: Spec, layers: list[Layer], on_host: Collection[int], *, in_parts: bool = False
) -> tuple[LayerPlacement, ...]:
    """Return the placement that streams as little as possible or, if that does not fit either, everything.

    `in_parts` it streams all experts, and as little as possible of the other weights.
    """
    sizes = [layer.own_bytes if in_parts else layer.stored_bytes for layer in layers]
    total, needed = sum(sum(each.values()) for each in sizes), 0
    while True:
        streamed = evenly(sizes, needed, on_host)
        if in_parts:
            streamed = [(*layer.experts, *own) for layer, own in zip(layers, streamed, strict=True)]
        placed = split(spec, layers, streamed, in_parts=in_parts)
        excess = room.excess(spec, placed)
        if excess <= 0 or needed >= total:
            return placed
        # streamed weights need slots, which take room from resident weights
        sent = sum(layer.streamed.own_bytes if in_parts else layer.streamed.nbytes for layer in placed)
        needed = min(total, sent + excess)


def evenly(layers: list[dict[str, int]], needed: int, whole: Collection[int]) -> list[tuple[str, ...]]:
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


def split(
    spec: Spec, layers: list[Layer], streamed: list[tuple[str, ...]], *, in_parts: bool = False
) -> tuple[LayerPlacement, ...]:
    """Return the placements of layers that stream what is given by its names in `stored_bytes`."""

    @cache
    def with_streamed(layer: Layer, chosen: tuple[str, ...]) -> LayerPlacement:
        packings = {p.name: packing for _, p in layer.parameters if (packing := spec.packing(p))}
        stays = [(name, p) for name, p in layer.parameters if unit(name, p) not in chosen]
        goes = [(name, p) for name, p in layer.parameters if unit(name, p) in chosen]
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
    if in_memory < len(sent) and room.is_routed(spec, placed):
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


def _fitting_host(spec: Spec, placed: Sequence[LayerPlacement]) -> int:
    """Return how many layers' streamed parts fit in host memory, beside the buffers for the others."""
    largest = largest_slab(placed)
    if spec.machine.device == "cpu" or not largest:
        return 0  # a CPU's resident weights already have that memory
    return min(sum(layer.streamed.nbytes > 0 for layer in placed), max(0, room.host_room(spec, placed) // largest))
