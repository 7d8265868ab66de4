"""Triton kernels that expand quantized weights."""

from typing import Any

import torch
import triton
import triton.language as tl

from zi_experiments.engines.stream.slab import Span
from zi_experiments.models.packing import Format

BLOCK = 2048  # elements that one program expands


@triton.jit
def _reciprocals(scale):  # type: ignore[no-untyped-def]
    # a group of equal or nearly equal values has an infinite scale, and codes of zero
    scale = tl.where(scale == float("inf"), 1.0, scale.to(tl.float32))
    return scale, tl.div_rn(1.0, scale)


@triton.jit  # type: ignore[untyped-decorator]
def _weights(code, scale, reciprocal, minimum, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    # code / scale, correctly rounded, from a product and its remainder (Markstein 1990): a third of a division's work
    code = code.to(tl.float32)
    product = code * reciprocal
    quotient = tl.fma(tl.fma(-product, scale, code), reciprocal, product)
    # also rounded to 16 bits before the sum, as torch does, so that the results are equal
    return (quotient.to(dtype).to(tl.float32) + minimum.to(tl.float32)).to(dtype)


@triton.jit
def _slab(chosen, index):  # type: ignore[no-untyped-def]
    """Return which slab is expanded: `index` itself, or the chosen one at that place."""
    return tl.load(chosen + index) if chosen is not None else index


@triton.jit  # type: ignore[untyped-decorator]
def _expand_groups(  # type: ignore[no-untyped-def]
    codes,
    scales,
    minima,
    out,
    chosen,
    start,
    target,
    groups,
    codes_stride,
    groups_stride,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    block: tl.constexpr,
):
    """Groups along rows: a program expands `block` groups, as the rows of its tile."""
    dtype: tl.constexpr = out.dtype.element_ty
    row = _slab(chosen, tl.program_id(1).to(tl.int64))
    group = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = group < groups
    first = start // group_size + group
    scale = tl.load(scales + row * groups_stride + first, mask=inside, other=1.0)
    scale, reciprocal = _reciprocals(scale[:, None])
    minimum = tl.load(minima + row * groups_stride + first, mask=inside, other=0.0)[:, None]
    codes += row * codes_stride
    out += target + tl.program_id(1).to(tl.int64) * groups * group_size
    each = group[:, None] * group_size + tl.arange(0, group_size)[None, :]
    if bits == 4:
        pair = first[:, None] * (group_size // 2) + tl.arange(0, group_size // 2)[None, :]
        both = tl.load(codes + pair, mask=inside[:, None], other=0)
        even = _weights(both >> 4, scale, reciprocal, minimum, dtype)
        odd = _weights(both & 15, scale, reciprocal, minimum, dtype)
        tl.store(out + each, tl.interleave(even, odd), mask=inside[:, None])
    else:
        code = tl.load(codes + start + each, mask=inside[:, None], other=0)
        tl.store(out + each, _weights(code, scale, reciprocal, minimum, dtype), mask=inside[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _expand_elements(  # type: ignore[no-untyped-def]
    codes,
    scales,
    minima,
    out,
    chosen,
    start,
    target,
    count,
    columns,
    codes_stride,
    groups_stride,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    across_rows: tl.constexpr,
    block: tl.constexpr,
):
    """Groups of any shape: each weight looks up its own group."""
    row = _slab(chosen, tl.program_id(1).to(tl.int64))
    element = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = element < count
    code = tl.load(codes + row * codes_stride + (start + element) // (8 // bits), mask=inside, other=0)
    if bits == 4:
        code = tl.where(element % 2 == 0, code >> 4, code & 15)
    group = element // columns // group_size * columns + element % columns if across_rows else element // group_size
    group += row * groups_stride + start // group_size
    scale, reciprocal = _reciprocals(tl.load(scales + group, mask=inside, other=1.0))
    minimum = tl.load(minima + group, mask=inside, other=0.0)
    out += target + tl.program_id(1).to(tl.int64) * count
    tl.store(out + element, _weights(code, scale, reciprocal, minimum, out.dtype.element_ty), mask=inside)


def expand_spans(
    parts: list[torch.Tensor], out: torch.Tensor, spans: list[Span], format: Format, chosen: torch.Tensor | None
) -> None:
    """Expand spans of several slabs; the parts, integers, scales and minima, have the shape (slabs, …).

    Those of the `chosen` slabs, or of all, follow one another in `out` from the target of a span on.
    """
    codes, scales, minima = parts
    bits, group_size, along_rows = format.bits, format.group_numel, format.group[0] == 1
    slabs = len(codes) if chosen is None else len(chosen)
    strides = codes.stride(0), scales.stride(0)
    for span in spans:
        start, count, columns, target = span.start, span.numel, span.columns, span.target
        grid = (triton.cdiv(count, BLOCK), slabs)
        kernel: Any
        if along_rows and group_size & (group_size - 1) == 0 and group_size <= BLOCK:
            groups, block = count // group_size, BLOCK // group_size
            kernel = _expand_groups[grid]
            kernel(codes, scales, minima, out, chosen, start, target, groups, *strides, bits, group_size, block)
        else:
            kernel = _expand_elements[grid]
            across_rows = not along_rows
            kernel(
                codes, scales, minima, out, chosen, start, target, count, columns, *strides, bits, group_size,
                across_rows, BLOCK,
            )  # fmt: skip
