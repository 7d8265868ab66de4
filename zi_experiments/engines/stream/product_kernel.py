"""Triton kernels that multiply a few rows with packed experts, each row with its own: nothing is expanded in memory.

A weight is rounded to 16 bits as when it is expanded, and products are added in 32 bits.
"""

import torch
import triton
import triton.language as tl

from zi_experiments.engines.stream.kernel import _reciprocals, _weights

TILE = 2048  # weights that a program loads at a time
ROWS = 8  # of a matrix, of which a program computes the results
COLUMNS = 128  # the same where the results belong to columns: a multiple of all group sizes
CHUNK = 256  # of its rows, over which such a program adds: few programs would leave the device idle
ADDED = 1024  # results of which a program adds the chunks
_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit  # type: ignore[untyped-decorator]
def _finished(total, biases, slab, bias_stride, at, inside, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return results in the 16-bit type; a bias is added after the product was rounded, as torch does."""
    total = total.to(dtype)
    if biases is not None:
        bias = tl.load(biases + slab * bias_stride + at, mask=inside, other=0.0)
        total = (total.to(tl.float32) + bias.to(tl.float32)).to(dtype)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _by_rows(  # type: ignore[no-untyped-def]
    x,
    tokens,
    slabs,
    targets,
    codes,
    scales,
    minima,
    biases,
    out,
    start,
    rows,
    columns,
    codes_stride,
    groups_stride,
    bias_stride,
    count,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    block: tl.constexpr,
    together: tl.constexpr,
):
    """out[target] = matrix · x[token] for matrices of shape (rows, columns), `together` groups of a row at a time."""
    dtype: tl.constexpr = out.dtype.element_ty
    pair = tl.program_id(1)
    slab = tl.load(slabs + pair)
    if slab >= count:
        return
    x += tl.load(tokens + pair) * columns
    row = tl.program_id(0) * block + tl.arange(0, block)
    inside = row < rows
    in_row = columns // group_size
    first = slab * groups_stride + start // group_size + row.to(tl.int64) * in_row
    codes += slab * codes_stride - slab * groups_stride * group_size * bits // 8
    within: tl.constexpr = group_size // 2 if bits == 4 else group_size
    total = tl.zeros((block, together, within), dtype=tl.float32)
    for begin in range(0, in_row, together):
        group = begin + tl.arange(0, together)
        there = inside[:, None] & (group < in_row)[None, :]
        at = first[:, None] + group[None, :]
        scale, reciprocal = _reciprocals(tl.load(scales + at, mask=there, other=1.0)[:, :, None])
        minimum = tl.load(minima + at, mask=there, other=0.0)[:, :, None]
        code = tl.load(
            codes + at[:, :, None] * within + tl.arange(0, within)[None, None, :], mask=there[:, :, None], other=0
        )
        column = group[:, None] * group_size + tl.arange(0, within)[None, :] * (group_size // within)
        known = (group < in_row)[:, None]
        if bits == 4:
            even = _weights(code >> 4, scale, reciprocal, minimum, dtype).to(tl.float32)
            odd = _weights(code & 15, scale, reciprocal, minimum, dtype).to(tl.float32)
            total += even * tl.load(x + column, mask=known, other=0.0).to(tl.float32)[None]
            total += odd * tl.load(x + column + 1, mask=known, other=0.0).to(tl.float32)[None]
        else:
            weight = _weights(code, scale, reciprocal, minimum, dtype).to(tl.float32)
            total += weight * tl.load(x + column, mask=known, other=0.0).to(tl.float32)[None]
    result = tl.sum(tl.sum(total, 2), 1)
    result = _finished(result, biases, slab, bias_stride, row, inside, dtype)
    tl.store(out + tl.load(targets + pair) * rows + row, result, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _by_columns(  # type: ignore[no-untyped-def]
    x,
    tokens,
    slabs,
    codes,
    scales,
    minima,
    sums,
    start,
    rows,
    columns,
    codes_stride,
    groups_stride,
    count,
    dtype: tl.constexpr,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    block: tl.constexpr,
    together: tl.constexpr,
    chunk: tl.constexpr,
):
    """sums[n, pair] = x[token] · rows of matrices of shape (rows, columns), the n-th `chunk` of them, `together` at a time."""
    pair = tl.program_id(1)
    slab = tl.load(slabs + pair)
    if slab >= count:
        return
    x += tl.load(tokens + pair) * rows
    in_row = columns // group_size
    group = tl.program_id(0) * (block // group_size) + tl.arange(0, block // group_size)
    first = slab * groups_stride + start // group_size
    codes += slab * codes_stride - slab * groups_stride * group_size * bits // 8
    within: tl.constexpr = group_size // 2 if bits == 4 else group_size
    total = tl.zeros((together, block // group_size, within), dtype=tl.float32)
    second = tl.zeros((together, block // group_size, within), dtype=tl.float32)
    for begin in range(0, chunk, together):
        row = tl.program_id(2) * chunk + begin + tl.arange(0, together)
        there = (row < rows)[:, None] & (group < in_row)[None, :]
        at = first + row.to(tl.int64)[:, None] * in_row + group[None, :]
        scale, reciprocal = _reciprocals(tl.load(scales + at, mask=there, other=1.0)[:, :, None])
        minimum = tl.load(minima + at, mask=there, other=0.0)[:, :, None]
        code = tl.load(
            codes + at[:, :, None] * within + tl.arange(0, within)[None, None, :], mask=there[:, :, None], other=0
        )
        factor = tl.load(x + row, mask=row < rows, other=0.0).to(tl.float32)[:, None, None]
        if bits == 4:
            total += _weights(code >> 4, scale, reciprocal, minimum, dtype).to(tl.float32) * factor
            second += _weights(code & 15, scale, reciprocal, minimum, dtype).to(tl.float32) * factor
        else:
            total += _weights(code, scale, reciprocal, minimum, dtype).to(tl.float32) * factor
    sums += (tl.program_id(2) * tl.num_programs(1) + pair) * columns
    column = group[:, None] * group_size + tl.arange(0, within)[None, :] * (group_size // within)
    inside = (group < in_row)[:, None]
    tl.store(sums + column, tl.sum(total, 0), mask=inside)
    if bits == 4:
        tl.store(sums + column + 1, tl.sum(second, 0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add_chunks(  # type: ignore[no-untyped-def]
    sums, slabs, targets, biases, out, columns, bias_stride, count, chunks, block: tl.constexpr
):
    """out[target] = the sum of the pair's chunks."""
    dtype: tl.constexpr = out.dtype.element_ty
    pair = tl.program_id(1)
    slab = tl.load(slabs + pair)
    if slab >= count:
        return
    column = tl.program_id(0) * block + tl.arange(0, block)
    inside = column < columns
    total = tl.zeros((block,), dtype=tl.float32)
    for chunk in range(chunks):
        total += tl.load(sums + (chunk * tl.num_programs(1) + pair) * columns + column, mask=inside, other=0.0)
    result = _finished(total, biases, slab, bias_stride, column, inside, dtype)
    tl.store(out + tl.load(targets + pair) * columns + column, result, mask=inside)


def multiply(
    x: torch.Tensor,
    pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    parts: list[torch.Tensor],
    biases: torch.Tensor | None,
    out: torch.Tensor,
    *,
    start: int,
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    by_columns: bool,
) -> None:
    """Write out[target] = x[token] times the matrix of a slab for each of `pairs`: tokens, slabs and targets.

    A slab's number that is too large is none: nothing is written then.
    `parts` are the integers, scales and minima of all slabs, of shape (slabs, …), and the matrices, of `shape`, begin at
    element `start`; `biases` are of shape (slabs, results). Inputs belong to rows of the matrix if results are `by_columns`.
    """
    codes, scales, minima = parts
    rows, columns = shape
    within = group_size // 2 if bits == 4 else group_size
    bias_stride = biases.stride(0) if biases is not None else 0
    if not by_columns:
        together = max(1, TILE // (ROWS * within))
        _by_rows[triton.cdiv(rows, ROWS), len(pairs[0])](
            x, *pairs, codes, scales, minima, biases, out, start, rows, columns, codes.stride(0), scales.stride(0),
            bias_stride, len(codes), bits, group_size, ROWS, together,
        )  # fmt: skip
        return
    together, chunks = max(1, TILE // (COLUMNS // group_size * within)), triton.cdiv(rows, CHUNK)
    sums = x.new_empty(chunks, len(pairs[0]), columns, dtype=torch.float32)
    tokens, slabs, targets = pairs
    _by_columns[triton.cdiv(columns, COLUMNS), len(tokens), chunks](
        x, tokens, slabs, codes, scales, minima, sums, start, rows, columns, codes.stride(0), scales.stride(0),
        len(codes), _DTYPES[out.dtype], bits, group_size, COLUMNS, together, CHUNK,
    )  # fmt: skip
    _add_chunks[triton.cdiv(columns, ADDED), len(tokens)](
        sums, slabs, targets, biases, out, columns, bias_stride, len(codes), chunks, ADDED
    )
