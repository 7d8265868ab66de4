"""The layout of a decoder layer's parameters in one flat slab of bytes."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
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
    """A slab: first 16-bit parameters, then the integers, the scales and the minima of all quantized ones, then experts.

    Quantized matrices follow one another, so that one kernel expands them all into one buffer. Each expert has a part of
    the slab to itself, so that it can be copied alone.
    """

    plain: tuple[Place, ...]
    quantized: tuple[Place, ...]
    quant: Quant
    shares: int = 1  # ranks that hold equal shares of it
    experts: "Stack | None" = None

    @cached_property
    def own_elements(self) -> int:
        """Elements of the buffer that the quantized parameters beside experts are expanded into."""
        return _up(max((place.end for place in self.quantized), default=0), _granule(self.quant))

    @property
    def elements(self) -> int:
        """Size of the buffer that all quantized parameters are expanded into, in 16-bit elements."""
        return self.own_elements + (self.experts.elements(self.experts.count) if self.experts else 0)

    @property
    def names(self) -> list[str]:
        """Names of all parameters in the slab, within the layer."""
        own = [place.name for place in (*self.plain, *self.quantized)]
        return own + (self.experts.each.names if self.experts else [])

    @cached_property
    def regions(self) -> tuple[slice, slice, slice]:
        """Byte ranges of the integers, the scales and the minima."""
        start = _up(max((place.end for place in self.plain), default=0) * ELEMENT_BYTES, ALIGNMENT)
        if not self.own_elements:
            return slice(start, start), slice(start, start), slice(start, start)
        codes = _up(self.own_elements * self.quant.bits // 8, ALIGNMENT)
        assert self.quant.group_size is not None
        groups = _up(self.own_elements // self.quant.group_size * ELEMENT_BYTES, ALIGNMENT)
        ends = (start + codes, start + codes + groups, start + codes + 2 * groups)
        return slice(start, ends[0]), slice(ends[0], ends[1]), slice(ends[1], ends[2])

    def packed_numel(self, numel: int) -> int:
        """Return how many 16-bit elements `numel` quantized weights take: integers, scales and minima."""
        assert self.quant.group_size is not None
        return numel * self.quant.bits // 16 + 2 * (numel // self.quant.group_size)

    @cached_property
    def own_bytes(self) -> int:
        """Bytes before the experts."""
        return _up(self.regions[2].stop, PAGE)

    @cached_property
    def nbytes(self) -> int:
        return _up(self.own_bytes + (self.experts.nbytes if self.experts else 0), PAGE * self.shares)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The experts of a decoder layer: parts of a slab, of equal size and content, one after the other."""

    each: Layout  # of one expert, with the names of the stacked parameters in the layer
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.each.nbytes

    def elements(self, count: int) -> int:
        """Return the size of the buffer that so many experts are expanded into."""
        return count * self.each.own_elements


def lay_out(parameters: Iterable[tuple[str, Parameter]], quantized: set[str], quant: Quant, shares: int = 1) -> Layout:
    """Return the layout of `parameters`, given with their names in the layer; `quantized` has names in the model."""
    given = list(parameters)
    stacked = [(name, p) for name, p in given if p.experts]
    experts = None
    if stacked:
        each = [(name, replace(p, shape=p.shape[1:], experts=None)) for name, p in stacked]
        experts = Stack(each=lay_out(each, quantized, quant), count=stacked[0][1].shape[0])
    plain: list[Place] = []
    packed: list[Place] = []
    following = {True: 0, False: 0}
    for name, parameter in given:
        if parameter.experts:
            continue
        is_quantized = parameter.name in quantized
        place = Place(name=name, shape=parameter.shape, start=following[is_quantized])
        (packed if is_quantized else plain).append(place)
        following[is_quantized] = _up(place.end, _granule(quant) if is_quantized else ALIGNMENT // ELEMENT_BYTES)
    return Layout(plain=tuple(plain), quantized=tuple(packed), quant=quant, shares=shares, experts=experts)


def plain_views(slab: Any, layout: Layout, dtype: Any) -> dict[str, Any]:
    """Return views of the 16-bit parameters in a slab (a uint8 tensor), by name."""
    elements = slab[: layout.regions[0].start].view(dtype)
    found = {place.name: elements[place.start : place.end].view(place.shape) for place in layout.plain}
    if layout.experts and layout.experts.each.plain:
        found |= plain_experts(experts_in(slab, layout), layout.experts.each, dtype)
    return found


def expanded_views(elements: Any, layout: Layout) -> dict[str, Any]:
    """Return views of the quantized parameters in the flat buffer that a slab is expanded into, by name."""
    found = {place.name: elements[place.start : place.end].view(place.shape) for place in layout.quantized}
    if layout.experts:
        found |= expanded_experts(elements[layout.own_elements :], layout.experts.each, layout.experts.count)
    return found


def experts_in(slab: Any, layout: Layout) -> Any:
    """Return a view of the experts in a slab (a uint8 tensor), of shape (experts, bytes)."""
    assert layout.experts is not None
    return slab[layout.own_bytes :][: layout.experts.nbytes].view(layout.experts.count, -1)


def plain_experts(experts: Any, each: Layout, dtype: Any) -> dict[str, Any]:
    """Return views of the 16-bit parameters of experts of shape (experts, bytes), by name; each is stacked."""
    rows = experts.view(dtype)
    return {place.name: rows[:, place.start : place.end].unflatten(1, place.shape) for place in each.plain}


def expanded_experts(elements: Any, each: Layout, count: int) -> dict[str, Any]:
    """Return views of the quantized parameters of `count` experts in the buffer that they are expanded into, by name."""
    return {
        place.name: elements[count * place.start :][: count * prod(place.shape)].view(count, *place.shape)
        for place in each.quantized
    }


def _granule(quant: Quant) -> int:
    """Return the alignment of quantized parameters in elements: whole groups, and aligned when expanded."""
    return lcm(ALIGNMENT // ELEMENT_BYTES, quant.group_size or 1)


def _up(amount: int, multiple: int) -> int:
    return -(-amount // multiple) * multiple
