"""The layout of a decoder layer's parameters in one flat slab of bytes."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import lcm, prod
from typing import Any

from zi_experiments.config.schema import Quant
from zi_experiments.cost_model.spec import ELEMENT_BYTES
from zi_experiments.models.architecture import Parameter

ALIGNMENT = 256  # bytes, as CUDA's own allocator: enough for every kernel
PAGE = 4096  # bytes: the unit of O_DIRECT reads and of pinning


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One parameter of a layer."""

    name: str  # within its layer
    shape: tuple[int, ...]
    start: int  # in 16-bit elements of the slab or, when quantized, of the buffer that it is expanded into

    @property
    def end(self) -> int:
        return self.start + prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A slab: first 16-bit parameters, then the integers, the scales and the minima of all quantized ones.

    Quantized matrices follow one another, so that one kernel expands them all into one buffer of `elements`.
    """

    plain: tuple[Place, ...]
    quantized: tuple[Place, ...]
    quant: Quant
    shares: int  # ranks that hold equal shares of it

    @cached_property
    def elements(self) -> int:
        """Size of the buffer that the quantized parameters are expanded into, in 16-bit elements."""
        return _up(max((place.end for place in self.quantized), default=0), _granule(self.quant))

    @cached_property
    def regions(self) -> tuple[slice, slice, slice]:
        """Byte ranges of the integers, the scales and the minima."""
        start = _up(max((place.end for place in self.plain), default=0) * ELEMENT_BYTES, ALIGNMENT)
        if not self.elements:
            return slice(start, start), slice(start, start), slice(start, start)
        codes = _up(self.elements * self.quant.bits // 8, ALIGNMENT)
        assert self.quant.group_size is not None
        groups = _up(self.elements // self.quant.group_size * ELEMENT_BYTES, ALIGNMENT)
        ends = (start + codes, start + codes + groups, start + codes + 2 * groups)
        return slice(start, ends[0]), slice(ends[0], ends[1]), slice(ends[1], ends[2])

    def packed_numel(self, numel: int) -> int:
        """Return how many 16-bit elements `numel` quantized weights take: integers, scales and minima."""
        assert self.quant.group_size is not None
        return numel * self.quant.bits // 16 + 2 * (numel // self.quant.group_size)

    @cached_property
    def nbytes(self) -> int:
        return _up(self.regions[2].stop, PAGE * self.shares)


def lay_out(parameters: Iterable[tuple[str, Parameter]], quantized: set[str], quant: Quant, shares: int) -> Layout:
    """Return the layout of `parameters`, given with their names in the layer; `quantized` has names in the model."""
    plain: list[Place] = []
    packed: list[Place] = []
    following = {True: 0, False: 0}
    for name, parameter in parameters:
        is_quantized = parameter.name in quantized
        place = Place(name=name, shape=parameter.shape, start=following[is_quantized])
        (packed if is_quantized else plain).append(place)
        following[is_quantized] = _up(place.end, _granule(quant) if is_quantized else ALIGNMENT // ELEMENT_BYTES)
    return Layout(plain=tuple(plain), quantized=tuple(packed), quant=quant, shares=shares)


def plain_views(slab: Any, layout: Layout, dtype: Any) -> dict[str, Any]:
    """Return views of the 16-bit parameters in a slab (a uint8 tensor), by name."""
    return views(slab[: layout.regions[0].start].view(dtype), layout.plain)


def views(elements: Any, places: Iterable[Place]) -> dict[str, Any]:
    """Return views of the parameters in a flat tensor of 16-bit elements, by name."""
    return {place.name: elements[place.start : place.end].view(place.shape) for place in places}


def _granule(quant: Quant) -> int:
    """Return the alignment of quantized parameters in elements: whole groups, and aligned when expanded."""
    return lcm(ALIGNMENT // ELEMENT_BYTES, quant.group_size or 1)


def _up(amount: int, multiple: int) -> int:
    return -(-amount // multiple) * multiple
