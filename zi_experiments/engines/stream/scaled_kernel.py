"""A Triton kernel that expands codes that are numbers of few bits, times the scale of their group."""

from typing import Any

import torch
import triton
import triton.language as tl

from zi_experiments.engines.stream.kernel import _slab
from zi_experiments.engines.stream.slab import Span
from zi_experiments.models.packing import Code, Format

TILE = (32, 128)  # rows and columns of the codes that one program expands
TRANSPOSED_TILE = (64, 64)  # the same where rows become columns: both sides are long enough for memory
MANTISSA = {Code.e4m3: 3, Code.e2m1: 1, Code.signed: 0}  # bits; integers have none
BIAS = {Code.e4m3: 7, Code.e2m1: 1, Code.signed: 0}  # of the exponent


@triton.jit  # type: ignore[untyped-decorator]
def _number(code, bits: tl.constexpr, mantissa: tl.constexpr, bias: tl.constexpr):  # type: ignore[no-untyped-def]
    code = code.to(tl.int16)
    if mantissa == 0:
        number = (code - (1 << (bits - 1))).to(tl.float32)
    else:
        # moved into the bits of a float16, whose exponent has another bias; its subnormal numbers become subnormal ones
        magnitude = code & ((1 << (bits - 1)) - 1)
        moved = (magnitude << (10 - mantissa)) | ((code >> (bits - 1)) << 15)
        number = moved.to(tl.float16, bitcast=True).to(tl.float32) * (2.0 ** (15 - bias))
        if bits == 8:
            number = tl.where(magnitude == 127, float("nan"), number)
    return number


@triton.jit
def _factor(scale):  # type: ignore[no-untyped-def]
    if scale.dtype == tl.uint8:  # an exponent, whose smallest value gives a subnormal number
        exponent = scale.to(tl.int32)
        return tl.where(exponent == 0, 0x400000, exponent << 23).to(tl.float32, bitcast=True)
    return scale.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _expand_tiles(  # type: ignore[no-untyped-def]
    codes,
    scales,
    out,
    chosen,
    matrices,
    rows,
    columns,
    codes_stride,
    scales_stride,
    bits: tl.constexpr,
    mantissa: tl.constexpr,
    bias: tl.constexpr,
    group_rows: tl.constexpr,
    group_columns: tl.constexpr,
    transposed: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
):
    """A program expands a tile of one of the `matrices` of a slab."""
    dtype: tl.constexpr = out.dtype.element_ty
    per_byte: tl.constexpr = 8 // bits
    index = tl.program_id(1).to(tl.int64)
    slab, matrix = _slab(chosen, index // matrices), index % matrices
    across = tl.cdiv(columns, tile_columns)
    row = tl.program_id(0) // across * tile_rows + tl.arange(0, tile_rows)
    byte = tl.program_id(0) % across * (tile_columns // per_byte) + tl.arange(0, tile_columns // per_byte)
    in_row = columns // per_byte
    inside = (row < rows)[:, None] & (byte < in_row)[None, :]
    codes += slab * codes_stride + matrix * rows * in_row
    code = tl.load(codes + row.to(tl.int64)[:, None] * in_row + byte[None, :], mask=inside, other=0)
    grid_columns = tl.cdiv(columns, group_columns)
    scales += slab * scales_stride + matrix * tl.cdiv(rows, group_rows) * grid_columns
    group = row[:, None] // group_rows * grid_columns + (byte * per_byte)[None, :] // group_columns
    factor = _factor(tl.load(scales + group, mask=inside, other=0))
    if bits == 4:
        low = (_number(code & 15, bits, mantissa, bias) * factor).to(dtype)
        high = (_number(code >> 4, bits, mantissa, bias) * factor).to(dtype)
        weight = tl.interleave(low, high)
    else:
        weight = (_number(code, bits, mantissa, bias) * factor).to(dtype)
    column = tl.program_id(0) % across * tile_columns + tl.arange(0, tile_columns)
    out += index * rows * columns
    if transposed:
        at = column.to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(out + at, tl.trans(weight), mask=(column < columns)[:, None] & (row < rows)[None, :])
    else:
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(out + at, weight, mask=(row < rows)[:, None] & (column < columns)[None, :])


def expand_spans(
    parts: list[torch.Tensor], out: torch.Tensor, spans: list[Span], format: Format, chosen: torch.Tensor | None
) -> None:
    """Expand spans of several slabs; the parts, codes and scales, have the shape (slabs, …).

    Those of the `chosen` slabs, or of all, follow one another in `out` from the target of a span on.
    """
    codes, scales = parts
    slabs = len(codes) if chosen is None else len(chosen)
    for span in spans:
        tile_rows, tile_columns = TRANSPOSED_TILE if span.transposed else TILE
        tiles = triton.cdiv(span.rows, tile_rows) * triton.cdiv(span.columns, tile_columns)
        kernel: Any = _expand_tiles[(tiles, slabs * span.matrices)]
        kernel(
            codes[:, span.start * format.bits // 8 :], scales[:, span.group :], out[span.target :], chosen,
            span.matrices, span.rows, span.columns, codes.stride(0), scales.stride(0), format.bits,
            MANTISSA[format.code], BIAS[format.code], *format.group, span.transposed, tile_rows, tile_columns,
        )  # fmt: skip
