"""Triton kernels that expand quantized weights."""

from typing import Any

import torch
import triton
import triton.language as tl

from zi_experiments.config.schema import Quant

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


@triton.jit  # type: ignore[untyped-decorator]
def _expand_groups(  # type: ignore[no-untyped-def]
    codes, scales, minima, out, start, groups, bits: tl.constexpr, group_size: tl.constexpr, block: tl.constexpr
):
    """Groups along rows: a program expands `block` groups, as the rows of its tile."""
    dtype: tl.constexpr = out.dtype.element_ty
    group = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = group < groups
    first = start // group_size + group
    scale, reciprocal = _reciprocals(tl.load(scales + first, mask=inside, other=1.0)[:, None])
    minimum = tl.load(minima + first, mask=inside, other=0.0)[:, None]
    each = first[:, None] * group_size + tl.arange(0, group_size)[None, :]
    if bits == 4:
        pair = first[:, None] * (group_size // 2) + tl.arange(0, group_size // 2)[None, :]
        both = tl.load(codes + pair, mask=inside[:, None], other=0)
        even = _weights(both >> 4, scale, reciprocal, minimum, dtype)
        odd = _weights(both & 15, scale, reciprocal, minimum, dtype)
        tl.store(out + each, tl.interleave(even, odd), mask=inside[:, None])
    else:
        code = tl.load(codes + each, mask=inside[:, None], other=0)
        tl.store(out + each, _weights(code, scale, reciprocal, minimum, dtype), mask=inside[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _expand_elements(  # type: ignore[no-untyped-def]
    codes,
    scales,
    minima,
    out,
    start,
    count,
    columns,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    across_rows: tl.constexpr,
    block: tl.constexpr,
):
    """Groups of any shape: each weight looks up its own group."""
    element = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = element < count
    code = tl.load(codes + (start + element) // (8 // bits), mask=inside, other=0)
    if bits == 4:
        code = tl.where(element % 2 == 0, code >> 4, code & 15)
    group = element // columns // group_size * columns + element % columns if across_rows else element // group_size
    scale, reciprocal = _reciprocals(tl.load(scales + start // group_size + group, mask=inside, other=1.0))
    minimum = tl.load(minima + start // group_size + group, mask=inside, other=0.0)
    tl.store(out + start + element, _weights(code, scale, reciprocal, minimum, out.dtype.element_ty), mask=inside)


def expand_spans(
    codes: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor,
    out: torch.Tensor,
    spans: list[tuple[int, int, int]],
    quant: Quant,
) -> None:
    """Expand `spans` (first element, rows, columns) of packed integers into the same elements of `out`."""
    bits, group_size = quant.bits, quant.group_size
    assert group_size is not None
    along_rows = quant.group_dim == 1
    for start, rows, columns in spans:
        count = rows * columns
        kernel: Any
        if along_rows and group_size & (group_size - 1) == 0 and group_size <= BLOCK:
            block = BLOCK // group_size
            kernel = _expand_groups[(triton.cdiv(count, BLOCK),)]
            kernel(codes, scales, minima, out, start, count // group_size, bits, group_size, block)
        else:
            kernel = _expand_elements[(triton.cdiv(count, BLOCK),)]
            kernel(codes, scales, minima, out, start, count, columns, bits, group_size, not along_rows, BLOCK)
