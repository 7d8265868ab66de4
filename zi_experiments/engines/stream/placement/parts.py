"""The decoder layers, and what of each is kept on the device or streamed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from zi_experiments.cost_model.spec import ELEMENT_BYTES, Spec
from zi_experiments.engines.stream.slab import Layout
from zi_experiments.models.architecture import Parameter
from zi_experiments.models.packing import Packing


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlacement:
    """Where the weights of one decoder layer are between passes."""

    resident: Layout  # stays on the device
    streamed: Layout  # is copied to the device in every pass
    on_disk: bool  # whether `streamed` is on disk, and not in host memory
    in_parts: bool = False  # whether a routed pass brings experts of `streamed` alone, and its other weights alone


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Layer:
    """The parameters of equal decoder layers: most models have one kind."""

    parameters: tuple[tuple[str, Parameter], ...]  # of the first such layer, with their names in it
    stored_bytes: dict[str, int]  # of each parameter, and of all experts together, the smallest first

    @property
    def experts(self) -> tuple[str, ...]:
        """The key of all experts together in `stored_bytes`, if the layer has experts."""
        return tuple(dict.fromkeys(unit(name, p) for name, p in self.parameters if p.experts))

    @property
    def own_bytes(self) -> dict[str, int]:
        """`stored_bytes` without experts."""
        return {name: nbytes for name, nbytes in self.stored_bytes.items() if name not in self.experts}


def layers_of(spec: Spec) -> list[Layer]:
    """Return the decoder layers, in the order in which they run."""
    parameters = sorted((p for p in spec.architecture.parameters if p.layer is not None), key=lambda p: p.layer or 0)
    kinds: dict[tuple[tuple[str, tuple[int, ...], Packing | None], ...], Layer] = {}
    layers = []
    for _, group in groupby(parameters, lambda p: p.layer):
        named = tuple((name_in_layer(p), p) for p in group)
        kind = tuple((name, p.shape, spec.packing(p)) for name, p in named)
        if kind not in kinds:
            sizes = Counter[str]()
            for name, p in named:
                sizes[unit(name, p)] += ELEMENT_BYTES * spec.stored_numel(p)
            kinds[kind] = Layer(parameters=named, stored_bytes=dict(reversed(sizes.most_common())))
        layers.append(kinds[kind])
    return layers


def unit(name: str, parameter: Parameter) -> str:
    """Return what a parameter moves with: its own name in the layer, or its module's if it belongs to experts."""
    return name.rpartition(".")[0] if parameter.experts else name


def name_in_layer(parameter: Parameter) -> str:
    """Return the name of a decoder layer's parameter within its layer."""
    return parameter.name.partition(f".{parameter.layer}.")[2]


def expanded_elements(placed: Sequence[LayerPlacement]) -> int:
    """Return the 16-bit elements of the buffer that all quantized layers share: those of the largest layer."""
    return max(layer.resident.elements + layer.streamed.elements for layer in placed)


def largest_slab(placed: Sequence[LayerPlacement]) -> int:
    """Return the bytes of the largest streamed slab."""
    return max(layer.streamed.nbytes for layer in placed)
