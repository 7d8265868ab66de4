"""The placement of a plan's weights: of those that fit, the one that streams least or is faster."""

from dataclasses import fields
from math import ceil

from zi_experiments.config.schema import OffloadDevice
from zi_experiments.cost_model.inventory import Home, Stored
from zi_experiments.cost_model.plan import Plan, Storage
from zi_experiments.cost_model.prediction import Prediction, predict
from zi_experiments.cost_model.spec import Spec
from zi_experiments.engines.stream import host_share, routing
from zi_experiments.engines.stream.placement import accounting, fitting, room
from zi_experiments.engines.stream.placement.parts import LayerPlacement, layers_of, name_in_layer


def place(spec: Spec) -> tuple[LayerPlacement, ...]:
    """Return the placement of each decoder layer, in the order in which they run."""
    layers, on_host = layers_of(spec), host_share.layers(spec)
    resident, sizes = spec.run.offload.resident, [layer.stored_bytes for layer in layers]
    if spec.run.offload.device is OffloadDevice.none:
        return fitting.split(spec, layers, fitting.evenly(sizes, 0, ()))
    if resident == "auto":
        whole = fitting.fit(spec, layers, on_host)
    else:
        total = sum(sum(layer.stored_bytes.values()) for layer in layers)
        whole = fitting.split(spec, layers, fitting.evenly(sizes, ceil((1 - resident) * total), on_host))
    if not routing.pays(spec) or (resident == "auto" and not any(layer.streamed.nbytes for layer in whole)):
        return whole
    routed = fitting.in_parts(spec, layers)
    if routed is None or (room.own_slot_bytes(spec, routed) and not _is_faster(spec, routed, whole)):
        return whole
    return routed


def _is_faster(spec: Spec, one: tuple[LayerPlacement, ...], other: tuple[LayerPlacement, ...]) -> bool:
    """Return whether a decode step of the first placement is predicted no slower; True where a rate is unknown."""
    first, second = (_predicted(spec, placed).decode_step_s for placed in (one, other))
    return first is None or second is None or first <= second


def _predicted(spec: Spec, placed: tuple[LayerPlacement, ...]) -> Prediction:
    known = {field.name: getattr(spec, field.name) for field in fields(Spec)}
    return predict(Plan(**known, storage=accounting.storage(spec, placed), pin_memory=True))


def storage(spec: Spec) -> Storage:
    """Return where this engine keeps the weights. Each rank has its own copy of the resident ones."""
    return accounting.storage(spec, place(spec))


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
