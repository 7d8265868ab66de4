"""Codes that are numbers of few bits, multiplied with the scale of their group: written into slabs, and expanded by torch.

The product is rounded to 32 bits and then to the run's 16-bit type, as transformers does.
"""

from functools import cache
from itertools import product

import torch

from zi_experiments.engines.stream.slab import Layout, Place, Span
from zi_experiments.models.native import E2M1, Packed
from zi_experiments.models.packing import Code, Format


def write(packed: Packed, slabs: torch.Tensor, layout: Layout, place: Place) -> None:
    """Copy a parameter's codes and scales into its place in a slab, or a stack of them into slabs (slabs, bytes)."""
    assert layout.format is not None
    codes, scales = (slabs[:, region] for region in layout.regions)
    flat = packed.codes.view(len(slabs), -1)
    codes[:, place.start * layout.format.bits // 8 :][:, : flat.shape[1]] = flat
    flat = packed.scales.view(len(slabs), -1).view(torch.uint8)
    scales[:, place.group * layout.format.numbers[0] :][:, : flat.shape[1]] = flat


def expand_span(parts: list[torch.Tensor], span: Span, target: torch.Tensor, format: Format) -> None:
    """Expand the matrices of a span, whose codes and scales are in `parts`, into a flat tensor of 16-bit elements."""
    codes, scales = parts
    columns = span.columns * format.bits // 8
    packed = codes[span.start * format.bits // 8 :][: span.matrices * span.rows * columns]
    grid = -(-span.rows // format.group[0]), -(-span.columns // format.group[1])
    scales = scales[span.group :][: span.matrices * grid[0] * grid[1]]
    shape = (span.columns, span.rows) if span.transposed else (span.rows, span.columns)
    matrices = zip(
        packed.view(span.matrices, span.rows, columns),
        scales.view(span.matrices, *grid),
        target.view(span.matrices, *shape),
        strict=True,
    )
    for matrix, scale, out in matrices:
        numbers = _numbers(matrix, format, target.dtype)
        _scale(numbers, _factors(scale, target.dtype), format.group)
        out.copy_(numbers.T if span.transposed else numbers)


def _numbers(codes: torch.Tensor, format: Format, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers that bytes of codes mean, of shape (rows, columns): exact in both 16-bit types."""
    table = _table(format, dtype).to(codes.device)
    of_bytes = table.view(torch.int32 if format.bits == 4 else torch.int16).flatten()
    found = of_bytes.index_select(0, codes.flatten().int())
    return found.view(dtype).view(len(codes), -1)


@cache
def _table(format: Format, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers that each byte of codes means, of shape (256, codes in a byte)."""
    codes = torch.arange(256, dtype=torch.uint8)[:, None]
    if format.code is Code.e4m3:
        return codes.view(torch.float8_e4m3fn).to(dtype)
    if format.bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), 1)
    if format.code is Code.signed:
        return codes.to(dtype).sub_(2 ** (format.bits - 1))
    return torch.tensor(E2M1, dtype=dtype).index_select(0, codes.flatten().int()).view(codes.shape)


def _factors(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return scales as what a product with numbers of a 16-bit type is exact in, before it is rounded to that type."""
    if scales.dtype != torch.uint8:
        return scales
    # bfloat16 has all exponents
    return scales.view(torch.float8_e8m0fnu).to(dtype if dtype is torch.bfloat16 else torch.float32)


def _scale(numbers: torch.Tensor, factors: torch.Tensor, group: tuple[int, int]) -> None:
    """Multiply numbers with the factors of their groups, in place: first whole groups, then those at the edges."""
    for rows, columns in product(
        *(_whole_and_rest(size, each) for size, each in zip(numbers.shape, group, strict=True))
    ):
        height, width = min(group[0], rows.stop - rows.start), min(group[1], columns.stop - columns.start)
        first = rows.start // group[0], columns.start // group[1]
        count = (rows.stop - rows.start) // height, (columns.stop - columns.start) // width
        factor = factors[first[0] :, first[1] :][: count[0], : count[1]]
        numbers[rows, columns].view(count[0], height, count[1], width).mul_(factor[:, None, :, None])


def _whole_and_rest(size: int, group: int) -> list[slice]:
    """Return the part of a side that whole groups cover, and the rest; only those that are not empty."""
    whole = size // group * group
    return [part for part in (slice(0, whole), slice(whole, size)) if part.stop > part.start]
