"""DeepSpeed's groupwise asymmetric format: packed into slabs when a model is loaded, expanded before a layer runs.

With `n` = 2^bits − 1 and the smallest and largest value of a group, scale = n / (largest − smallest), code =
round((x − smallest) · scale), and a weight is code / scale + smallest, each step rounded to the 16-bit type.
"""

from math import prod

import torch

from zi_experiments.config.schema import Quant
from zi_experiments.engines.stream.slab import Layout, Place, experts_in, plain_experts

WIDEST_GROUP = 128  # of those that packed weights are multiplied with
BLOCK = 1 << 26  # elements that are packed at a time, so that temporaries stay small


def pack(weight: torch.Tensor, slab: torch.Tensor, layout: Layout, place: Place) -> None:
    """Quantize a matrix (rows, columns), or a stack of them, into its place in a slab of bytes on the same device."""
    codes, scales, minima = _parts(slab, layout, weight.dtype)
    rows = weight.reshape(-1, weight.shape[-1])
    group_size, per_byte = layout.quant.group_size, 8 // layout.quant.bits
    assert group_size is not None
    step = max(1, BLOCK // rows.shape[1] // group_size) * group_size
    for first in range(0, len(rows), step):
        block = rows[first : first + step]
        start = place.start + first * rows.shape[1]
        integers, scale, minimum = _quantize(block, layout.quant)
        if per_byte == 2:
            integers = integers[0::2] << 4 | integers[1::2]
        codes[start // per_byte :][: len(integers)] = integers
        scales[start // group_size :][: len(scale)] = scale
        minima[start // group_size :][: len(minimum)] = minimum


def _quantize(rows: torch.Tensor, quant: Quant) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the integers as bytes, the scales and the minima of some rows, each flat."""
    assert quant.group_dim is not None
    groups = rows.unflatten(  # type: ignore[no-untyped-call]
        quant.group_dim, (-1, quant.group_size)
    )
    within = quant.group_dim + 1
    low, high = torch.aminmax(groups, dim=within, keepdim=True)
    largest = 2**quant.bits - 1
    scale = largest / (high - low)
    # a group of values so close that its scale overflows gets codes of zero, as the kernel expects
    codes = ((groups - low) * scale).nan_to_num_(0.0, posinf=0.0).round_().clamp_(0, largest).to(torch.uint8)
    return codes.flatten(), scale.flatten(), low.flatten()


def expand(slab: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
    """Expand all quantized parameters of a slab into a flat tensor of 16-bit elements on the same device."""
    expand_own(slab, layout, out)
    if layout.experts:
        expand_experts(experts_in(slab, layout), layout.experts.each, out[layout.own_elements :])


def expand_own(slab: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
    """Expand the quantized parameters beside experts."""
    if layout.own_elements:
        _expand(slab[None], layout, out, [(*span, span[0]) for span in spans(layout)])


def expand_experts(experts: torch.Tensor, each: Layout, out: torch.Tensor, chosen: torch.Tensor | None = None) -> None:
    """Expand experts, of shape (experts, bytes), into the stacks that `expanded_experts` has views of.

    `chosen`, int64 on the device of `experts`, has the rows to expand; without it all are.
    """
    count = len(experts) if chosen is None else len(chosen)
    matrices = [(place, prod(place.shape) // place.shape[-1], place.shape[-1]) for place in each.quantized]
    _expand(experts, each, out, [(p.start, rows, columns, count * p.start) for p, rows, columns in matrices], chosen)


def multiplies(layout: Layout, like: torch.Tensor) -> bool:
    """Return whether `multiply_packed` supports all matrices of a layout, on the device of a tensor."""
    size = layout.quant.group_size or 0
    groups = layout.quant.group_dim == 1 and 0 < size <= WIDEST_GROUP and not size & (size - 1)
    matrices = (
        all(len(place.shape) == 2 and place.shape[1] % size == 0 for place in layout.quantized) if groups else False
    )
    return uses_kernel(like) and matrices and bool(layout.quantized)


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
    parts, quant = _parts(slabs, layout, x.dtype), layout.quant
    assert quant.group_size is not None
    multiply(
        x.contiguous(), pairs, parts, biases, out, start=place.start, shape=(rows, columns), bits=quant.bits,
        group_size=quant.group_size, by_columns=transposed,
    )  # fmt: skip
    return out


def _expand(
    slabs: torch.Tensor,
    layout: Layout,
    out: torch.Tensor,
    matrices: list[tuple[int, int, int, int]],
    chosen: torch.Tensor | None = None,
) -> None:
    """Expand `matrices` of all, or of the chosen, rows of `slabs`, given as (first element, rows, columns, target).

    The first of them is expanded into `out` from element `target` on, and the others follow it.
    """
    if uses_kernel(slabs):
        from zi_experiments.engines.stream.kernel import expand_spans  # Triton comes with CUDA builds of torch

        expand_spans(*_parts(slabs, layout, out.dtype), out, matrices, layout.quant, chosen)
        return
    for index, row in enumerate(range(len(slabs)) if chosen is None else chosen.tolist()):
        parts = _parts(slabs[row], layout, out.dtype)
        for start, rows, columns, target in matrices:
            first = target + index * rows * columns
            _expand_matrix(parts, (start, rows, columns), out[first : first + rows * columns], layout.quant)


def uses_kernel(slabs: torch.Tensor) -> bool:
    return slabs.is_cuda


def _expand_matrix(
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    span: tuple[int, int, int],
    target: torch.Tensor,
    quant: Quant,
) -> None:
    (codes, scales, minima), (start, rows, columns) = parts, span
    group_size, per_byte = quant.group_size, 8 // quant.bits
    assert group_size is not None
    packed = codes[start // per_byte :][: rows * columns // per_byte]
    if per_byte == 2:
        target[0::2] = packed >> 4
        target[1::2] = packed & 15
    else:
        target.copy_(packed)
    shape = (-1, group_size, columns) if quant.group_dim == 0 else (-1, group_size)
    groups = (-1, 1, columns) if quant.group_dim == 0 else (-1, 1)
    count = rows * columns // group_size
    scale, minimum = (part[start // group_size :][:count].view(groups) for part in (scales, minima))
    target.view(shape).div_(scale).add_(minimum)


def spans(layout: Layout) -> list[tuple[int, int, int]]:
    """Return the spans that are expanded one at a time: (first element, rows, columns).

    Groups along rows are contiguous, whatever the shape of a matrix, so all matrices are one span. Groups across rows
    depend on the columns of their matrix.
    """
    if layout.quant.group_dim == 1:
        assert layout.quant.group_size is not None
        return [(0, layout.own_elements // layout.quant.group_size, layout.quant.group_size)]
    return [(place.start, (place.end - place.start) // place.shape[-1], place.shape[-1]) for place in layout.quantized]


def _parts(slab: torch.Tensor, layout: Layout, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the integers, scales and minima of a slab, or of several: of shape (…, bytes)."""
    codes, scales, minima = (slab[..., region] for region in layout.regions)
    return codes, scales.view(dtype), minima.view(dtype)
