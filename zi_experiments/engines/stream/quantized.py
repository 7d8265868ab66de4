"""Quantized weights: packed into slabs when a model is loaded, expanded before a layer runs.

DeepSpeed's groupwise asymmetric format is here, those of checkpoints are in `scaled`. With `n` = 2^bits − 1 and the smallest
and largest value of a group, scale = n / (largest − smallest), code = round((x − smallest) · scale), and a weight is
code / scale + smallest, each step rounded to the 16-bit type.
"""

from typing import NamedTuple

import torch

from zi_experiments.cost_model.spec import ELEMENT_BYTES
from zi_experiments.engines.stream import scaled
from zi_experiments.engines.stream.slab import Layout, Place, Span, experts_in, plain_experts
from zi_experiments.models.packing import Code, Format

WIDEST_GROUP = 128  # of those that packed weights are multiplied with
BLOCK = 1 << 26  # elements that are packed at a time, so that temporaries stay small


def pack(weight: torch.Tensor, slab: torch.Tensor, layout: Layout, place: Place) -> None:
    """Quantize a matrix (rows, columns), or a stack of them, into its place in a slab of bytes on the same device."""
    codes, scales, minima = _parts(slab, layout, weight.dtype)
    rows = weight.reshape(-1, weight.shape[-1])
    assert layout.format is not None
    group_size, per_byte = layout.format.group_numel, 8 // layout.format.bits
    step = max(1, BLOCK // rows.shape[1] // group_size) * group_size
    for first in range(0, len(rows), step):
        block = rows[first : first + step]
        start, group = place.start + first * rows.shape[1], place.group + first * rows.shape[1] // group_size
        integers, scale, minimum = _quantize(block, layout.format)
        if per_byte == 2:
            integers = integers[0::2] << 4 | integers[1::2]
        codes[start // per_byte :][: len(integers)] = integers
        scales[group:][: len(scale)] = scale
        minima[group:][: len(minimum)] = minimum


def _quantize(rows: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the integers as bytes, the scales and the minima of some rows, each flat."""
    dim = 1 if _is_along_rows(format) else 0
    groups = rows.unflatten(dim, (-1, format.group_numel))  # type: ignore[no-untyped-call]
    low, high = torch.aminmax(groups, dim=dim + 1, keepdim=True)
    largest = 2**format.bits - 1
    scale = largest / (high - low)
    # a group of values so close that its scale overflows gets codes of zero, as the kernel expects
    codes = ((groups - low) * scale).nan_to_num_(0.0, posinf=0.0).round_().clamp_(0, largest).to(torch.uint8)
    return codes.flatten(), scale.flatten(), low.flatten()


def expand(slab: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
    """Expand all quantized parameters of a slab into a flat tensor of 16-bit elements on the same device."""
    expand_own(slab, layout, out)
    if layout.experts and layout.experts.each.quantized:
        expand_experts(experts_in(slab, layout), layout.experts.each, out[layout.own_elements :])


def expand_own(slab: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
    """Expand the quantized parameters beside experts."""
    if layout.own_elements:
        _expand(slab[None], layout, out, own_spans(layout))


def expand_experts(experts: torch.Tensor, each: Layout, out: torch.Tensor, chosen: torch.Tensor | None = None) -> None:
    """Expand experts, of shape (experts, bytes), into the stacks that `expanded_experts` has views of.

    `chosen`, int64 on the device of `experts`, has the rows to expand; without it all are.
    """
    count = len(experts) if chosen is None else len(chosen)
    _expand(experts, each, out, [place.span(count * place.start) for place in each.quantized], chosen)


def multiplies(layout: Layout, like: torch.Tensor) -> bool:
    """Return whether `multiply_packed` supports all matrices of a layout, on the device of a tensor."""
    if layout.format is None or layout.format.code is not Code.asymmetric or not uses_kernel(like):
        return False
    if not _is_along_rows(layout.format):
        return False
    size = layout.format.group_numel
    matrices = all(len(place.shape) == 2 and place.shape[1] % size == 0 for place in layout.quantized)
    return matrices and size <= WIDEST_GROUP and not size & (size - 1)


def multiply_packed(
    x: torch.Tensor,
    pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    slabs: torch.Tensor,
    layout: Layout,
    name: str,
    *,
    bias: str | None = None,
    transposed: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `out` with row `target` set to row `token` of `x` times the packed matrix of a slab, for each of `pairs`.

    Pairs are three tensors: tokens, rows of `slabs` (uint8 of shape (slabs, bytes)), and targets; without `out` there is a
    row for each. `name` and `bias` are those of parameters in the layer. A matrix is of shape (outputs, inputs), or
    (inputs, outputs) if `transposed`.
    """
    from zi_experiments.engines.stream.product_kernel import multiply

    place = next(place for place in layout.quantized if place.name == name)
    rows, columns = place.shape
    if out is None:
        out = x.new_empty(len(pairs[0]), columns if transposed else rows)
    biases = plain_experts(slabs, layout, x.dtype)[bias] if bias else None
    parts, format = _parts(slabs, layout, x.dtype), layout.format
    assert format is not None
    multiply(
        x.contiguous(), pairs, parts, biases, out, start=place.start, shape=(rows, columns), bits=format.bits,
        group_size=format.group_numel, by_columns=transposed,
    )  # fmt: skip
    return out


def _expand(
    slabs: torch.Tensor, layout: Layout, out: torch.Tensor, spans: list[Span], chosen: torch.Tensor | None = None
) -> None:
    """Expand the spans of all, or of the chosen, rows of `slabs`.

    Those of the first row are expanded into `out` from their targets on, and those of others follow them.
    """
    if layout.format is None:
        return
    is_scaled = layout.format.code is not Code.asymmetric
    if uses_kernel(slabs):
        from zi_experiments.engines.stream import kernel, scaled_kernel  # Triton comes with CUDA builds of torch

        by_kernel = scaled_kernel.expand_spans if is_scaled else kernel.expand_spans
        by_kernel(_parts(slabs, layout, out.dtype), out, spans, layout.format, chosen)
        return
    by_torch = scaled.expand_span if is_scaled else _expand_span
    for index, row in enumerate(range(len(slabs)) if chosen is None else chosen.tolist()):
        parts = _parts(slabs[row], layout, out.dtype)
        for span in spans:
            by_torch(parts, span, out[span.target + index * span.numel :][: span.numel], layout.format)


def uses_kernel(slabs: torch.Tensor) -> bool:
    return slabs.is_cuda


def _expand_span(parts: list[torch.Tensor], span: Span, target: torch.Tensor, format: Format) -> None:
    codes, scales, minima = parts
    group_size, per_byte = format.group_numel, 8 // format.bits
    packed = codes[span.start // per_byte :][: span.numel // per_byte]
    if per_byte == 2:
        target[0::2] = packed >> 4
        target[1::2] = packed & 15
    else:
        target.copy_(packed)
    along_rows = _is_along_rows(format)
    shape = (-1, group_size) if along_rows else (-1, group_size, span.columns)
    groups = (-1, 1) if along_rows else (-1, 1, span.columns)
    scale, minimum = (part[span.group :][: span.numel // group_size].view(groups) for part in (scales, minima))
    target.view(shape).div_(scale).add_(minimum)


class Packed(NamedTuple):
    """An INT4 matrix in DeepSpeed's format, whose groups lie along the inputs."""

    codes: torch.Tensor  # uint8 (outputs, inputs / 2): the first of two in the high half of a byte
    scales: torch.Tensor  # (outputs, groups), in the 16-bit type
    minima: torch.Tensor


def packed_views(slab: torch.Tensor, layout: Layout, dtype: torch.dtype) -> dict[str, Packed]:
    """Return views of the matrices (outputs, inputs) in a slab, by the names of parameters."""
    if not layout.quantized:
        return {}
    codes, scales, minima = _parts(slab, layout, dtype)
    found = {}
    for place in layout.quantized:
        assert place.packing is not None
        rows, columns = place.shape
        groups = slice(place.group, place.group + place.packing.groups(place.shape))
        found[place.name] = Packed(
            codes[place.start // 2 :][: rows * columns // 2].view(rows, -1),
            scales[groups].view(rows, -1),
            minima[groups].view(rows, -1),
        )
    return found


def own_spans(layout: Layout) -> list[Span]:
    """Return the spans of the quantized parameters beside experts.

    DeepSpeed's groups along rows are contiguous, whatever the shape of a matrix, so all matrices are one span. Other groups
    depend on the shape of their matrix.
    """
    assert layout.format is not None
    if layout.format.code is Code.asymmetric and _is_along_rows(layout.format):
        size = layout.format.group_numel
        return [Span(start=0, group=0, matrices=1, rows=layout.own_elements // size, columns=size, target=0)]
    return [place.span(place.start) for place in layout.quantized]


def _is_along_rows(format: Format) -> bool:
    return format.group[0] == 1


def _parts(slab: torch.Tensor, layout: Layout, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the codes of a slab, or of several (of shape (slabs, bytes)), and each number of their groups."""
    assert layout.format is not None
    codes, *numbers = (slab[..., region] for region in layout.regions)
    types = {1: torch.uint8, ELEMENT_BYTES: dtype, 4: torch.float32}
    return [codes, *(part.view(types[each]) for part, each in zip(numbers, layout.format.numbers, strict=True))]
