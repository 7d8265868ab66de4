"""The layout of a decoder layer's parameters in one flat slab of bytes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import lcm, prod
from typing import Any

from zi_experiments.cost_model.spec import ELEMENT_BYTES
from zi_experiments.models.architecture import Parameter
from zi_experiments.models.packing import Format, Packing

ALIGNMENT = 256  # bytes, as CUDA's own allocator: enough for every kernel
PAGE = 4096  # bytes: the unit of O_DIRECT reads and of pinning


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One parameter of a layer."""

    name: str  # within its layer
    shape: tuple[int, ...]
    start: int  # in 16-bit elements of the slab or, when quantized, of the buffer that it is expanded into; so are its codes
    group: int = 0  # the first of its groups
    packing: Packing | None = None  # how it is quantized

    @property
    def end(self) -> int:
        return self.start + prod(self.shape)

    @property
    def end_group(self) -> int:
        """The first group after it. Gaps between parameters have groups too, where those are parts of rows."""
        assert self.packing is not None
        padded = _up(self.end, granule(self.packing.format)) - self.start
        return self.group + max(self.packing.groups(self.shape), padded // self.packing.format.group_numel)

    def span(self, target: int) -> "Span":
        """Return what is expanded into a buffer of 16-bit elements from `target` on."""
        assert self.packing is not None
        matrices, rows, columns = self.packing.codes(self.shape)
        return Span(
            start=self.start,
            group=self.group,
            matrices=matrices,
            rows=rows,
            columns=columns,
            transposed=self.packing.transposed,
            target=target,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Quantized matrices of equal shape that follow one another, in a slab and when they are expanded."""

    start: int  # the first code
    group: int  # the first group
    matrices: int
    rows: int  # of codes in each matrix
    columns: int
    transposed: bool = False  # whether the codes are those of the transposed matrices
    target: int  # the first element of the buffer that they are expanded into

    @property
    def numel(self) -> int:
        return self.matrices * self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A slab: first 16-bit parameters, then the codes and the numbers of the groups of all quantized ones, then experts.

    Quantized matrices follow one another, and are expanded into one buffer. Each expert has a part of the slab to itself,
    so that it can be copied alone.
    """

    plain: tuple[Place, ...]
    quantized: tuple[Place, ...]  # all in one format
    shares: int = 1  # ranks that hold equal shares of it
    experts: "Stack | None" = None

    @cached_property
    def format(self) -> Format | None:
        """The format of the quantized parameters beside experts; None if there are none."""
        return self.quantized[0].packing.format if self.quantized and self.quantized[0].packing else None

    @cached_property
    def own_elements(self) -> int:
        """Elements of the buffer that the quantized parameters beside experts are expanded into."""
        return _up(self.quantized[-1].end, granule(self.format)) if self.format else 0

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
    def plain_bytes(self) -> int:
        """Bytes of the 16-bit parameters beside experts."""
        return _up(max((place.end for place in self.plain), default=0) * ELEMENT_BYTES, ALIGNMENT)

    @cached_property
    def regions(self) -> tuple[slice, ...]:
        """Byte ranges of the codes, and of each number that groups have."""
        if self.format is None:
            return ()
        codes, groups = self.own_elements * self.format.bits // 8, self.quantized[-1].end_group
        sizes = [_up(size, ALIGNMENT) for size in (codes, *(groups * nbytes for nbytes in self.format.numbers))]
        ends = list(accumulate(sizes, initial=self.plain_bytes))
        return tuple(slice(start, end) for start, end in pairwise(ends))

    @property
    def packings(self) -> dict[str, Packing]:
        """How each quantized parameter is stored, by its name in the layer."""
        own = {place.name: place.packing for place in self.quantized if place.packing}
        return own | (self.experts.each.packings if self.experts else {})

    @cached_property
    def own(self) -> "Layout":
        """What is before the experts."""
        return replace(self, experts=None)

    @cached_property
    def own_bytes(self) -> int:
        """Bytes before the experts."""
        return _up(self.regions[-1].stop if self.regions else self.plain_bytes, PAGE)

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


def lay_out(parameters: Iterable[tuple[str, Parameter]], packings: Mapping[str, Packing], shares: int = 1) -> Layout:
    """Return the layout of `parameters`, given with their names in the layer.

    `packings` has those that are quantized, by their names in the model.
    """
    given = list(parameters)
    stacked = [(name, p) for name, p in given if p.experts]
    experts = None
    if stacked:
        each = [(name, replace(p, shape=p.shape[1:], experts=None)) for name, p in stacked]
        experts = Stack(each=lay_out(each, packings), count=stacked[0][1].shape[0])
    own = [(name, p, packings.get(p.name)) for name, p in given if not p.experts]
    plain: list[Place] = []
    packed: list[Place] = []
    for name, parameter, packing in own:
        places = plain if packing is None else packed
        start = _up(places[-1].end, granule(packing.format if packing else None)) if places else 0
        group = packed[-1].end_group if packing and packed else 0
        places.append(Place(name=name, shape=parameter.shape, start=start, group=group, packing=packing))
    assert len({place.packing.format for place in packed if place.packing}) <= 1, "one format for a slab"
    return Layout(plain=tuple(plain), quantized=tuple(packed), shares=shares, experts=experts)


def plain_views(slab: Any, layout: Layout, dtype: Any) -> dict[str, Any]:
    """Return views of the 16-bit parameters in a slab (a uint8 tensor), by name."""
    elements = slab[: layout.plain_bytes].view(dtype)
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


def granule(format: Format | None) -> int:
    """Return the alignment of parameters in elements: also when they are expanded, and of whole groups in rows."""
    return lcm(ALIGNMENT // ELEMENT_BYTES, max(format.group) if format else 1)


def _up(amount: int, multiple: int) -> int:
    return -(-amount // multiple) * multiple
