"""Quantized weights of a checkpoint become 16-bit tensors, on the device where their codes are.

Where transformers or compressed-tensors has the operation, it is theirs. GPTQ and AWQ are written from their published
layouts: the packages that have them do not install on every version of Python. So is bitsandbytes, whose files have all that
it takes. Large weights are expanded in strips of rows, since values in 32 bits on the way would take several times the
memory of the weight.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

STRIP_ELEMENTS = 1 << 24  # expanded at a time
# the column that each of the eight 4-bit codes in a word of AWQ belongs to, from the lowest bits
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def fp8(codes: Any, scales: Any, dtype: Any, block: tuple[int, int] | None) -> Any:
    """Return FP8 weights (…, rows, columns), or FP4 codes two in a byte, times the scales of their blocks.

    transformers derives the size of the blocks from the numbers of rows and scales, and refuses or misreads a weight whose
    last block is not whole: it is given parts that consist of whole blocks, or of equal parts of one.
    """
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    expand = Fp8Dequantize(None)._dequantize_one
    width = 1 if codes.dtype.is_floating_point else 2
    if scales.numel() == 1:
        scales = scales.reshape(1, 1)
    *_, rows, columns = codes.shape
    high, wide = (
        _block(size, count, of)
        for size, count, of in zip(
            (rows, columns * width), scales.shape[-2:], block or (rows, columns * width), strict=True
        )
    )
    wide //= width
    made = torch.empty((*codes.shape[:-1], columns * width), dtype=dtype, device=codes.device)
    for row, row_scales in _parts(rows, high, STRIP_ELEMENTS // (columns * width)):
        for column, column_scales in _parts(columns, wide, columns):
            part = expand(codes[..., row, column], scales[..., row_scales, column_scales], output_dtype=dtype)
            made[..., row, column.start * width : column.stop * width] = part
    return made


def _block(size: int, scales: int, named: int) -> int:
    """Return the size of a block: as the configuration names it, if there are so many scales, else as they divide."""
    return named if -(-size // named) == scales else size // scales


def _parts(size: int, block: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of whole blocks and of their scales, of `most` elements or of one block; a last part may be less."""
    blocks, whole = max(1, most // block), size // block
    for first in range(0, whole, blocks):
        last = min(first + blocks, whole)
        yield slice(first * block, last * block), slice(first, last)
    if size % block:
        yield slice(whole * block, size), slice(whole, whole + 1)


def is_ragged(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, ...]) -> bool:
    """Return whether a weight has a scale for each block of that size, and its last block is not whole."""
    if min(len(shape), len(scales)) < 2:
        return False
    numbers = tuple(-(-size // one) for size, one in zip(shape[-2:], block, strict=True))
    whole = all(size % one == 0 for size, one in zip(shape[-2:], block, strict=True))
    return numbers == tuple(scales[-2:]) and not whole


def mxfp4(blocks: Any, scales: Any, dtype: Any) -> Any:
    """Return experts (experts, columns, rows) of FP4 codes (experts, rows, groups, 16) and a power of two per group."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales, dtype=dtype)


def compressed(dtype: Any, form: str, scheme: Any, **parts: Any) -> Any:
    """Return a weight of compressed-tensors, from the tensors of its module by their local names."""
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(form).decompress(parts, scheme)["weight"].to(dtype)


def gptq(qweight: Any, qzeros: Any, scales: Any, dtype: Any, bits: int, offset: int, g_idx: Any = None) -> Any:
    """Return a weight (outputs, inputs) of GPTQ: scale · (code − zero − `offset`), by group of inputs.

    `qweight` (inputs · bits / 32, outputs) has the codes of consecutive inputs in a word, from the lowest bits; `qzeros`
    (groups, outputs · bits / 32) those of consecutive outputs. `g_idx` is the group of each input. The older of the two
    formats stores zeros less one.
    """
    import torch

    in_word = 32 // bits
    inputs, outputs = len(qweight) * in_word, qweight.shape[1]
    if g_idx is None:
        g_idx = torch.arange(inputs, device=qweight.device) // (inputs // len(scales))
    made = torch.empty(outputs, inputs, dtype=dtype, device=qweight.device)
    for rows, words in _parts(outputs, in_word, STRIP_ELEMENTS // inputs):
        codes = _unpacked(qweight[:, rows], bits).transpose(1, 2).flatten(0, 1)  # (inputs, outputs)
        zeros = _unpacked(qzeros[:, words], bits).flatten(1, 2)[:, : codes.shape[1]] + offset
        made[rows] = (scales[:, rows].float()[g_idx.long()] * (codes - zeros[g_idx.long()])).t()
    return made


def awq(qweight: Any, qzeros: Any, scales: Any, dtype: Any) -> Any:
    """Return a weight (outputs, inputs) of AWQ: scale · (code − zero), by group of inputs.

    `qweight` (inputs, outputs / 8) and `qzeros` (groups, outputs / 8) have the codes of eight outputs in a word, in an
    order of their own.
    """
    import torch

    inputs, outputs = len(qweight), qweight.shape[1] * 8
    order = torch.tensor(_AWQ_COLUMNS, device=qweight.device).argsort()
    made = torch.empty(outputs, inputs, dtype=dtype, device=qweight.device)
    for rows, words in _parts(outputs, 8, STRIP_ELEMENTS // inputs):
        codes, zeros = (_unpacked(of[:, words], 4)[..., order].flatten(1, 2) for of in (qweight, qzeros))
        groups = codes.unflatten(0, (len(scales), -1)) - zeros[:, None]
        made[rows] = (scales[:, rows].float()[:, None] * groups).flatten(0, 1).t()
    return made


def _unpacked(words: Any, bits: int) -> Any:
    """Return the codes in words (…) of 32 bits, from the lowest bits: int32 of shape (…, 32 / bits)."""
    import torch

    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    return (words[..., None] >> shifts) & (2**bits - 1)


def bitsandbytes_4bit(
    dtype: Any,
    codes: Any,
    absmax: Any,
    quant_map: Any,
    shape: tuple[int, ...],
    stated: Mapping[str, Any],
    **nested: Any,
) -> Any:
    """Return weights of NF4 or FP4: the entries of a map that the codes name, times the largest value of their block.

    These values may be codes themselves. A byte has two codes, the first in its upper half.
    """
    import torch

    if nested:
        blocks = nested["nested_absmax"].repeat_interleave(stated["nested_blocksize"])[: absmax.numel()]
        absmax = nested["nested_quant_map"][absmax.int()] * blocks + stated["nested_offset"]
    made: Any = torch.empty(prod(shape), dtype=dtype, device=codes.device)
    size = stated["blocksize"]
    stated_dtype = getattr(torch, stated["dtype"])  # to which bitsandbytes rounds
    for strip, some, largest in zip(
        made.split(STRIP_ELEMENTS),
        codes.flatten().split(STRIP_ELEMENTS // 2),
        absmax.split(STRIP_ELEMENTS // size),
        strict=True,
    ):
        values = quant_map[torch.stack((some >> 4, some & 15), 1).flatten()[: strip.numel()].int()]
        scaled = values * largest.repeat_interleave(size)[: strip.numel()]
        strip.copy_(scaled.to(stated_dtype))
    return made.view(shape)


def bitsandbytes_8bit(codes: Any, scales: Any, dtype: Any) -> Any:
    """Return weights of LLM.int8(): integers up to 127, times the largest value of their row."""
    import torch

    made: Any = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    step = max(1, STRIP_ELEMENTS // codes.shape[1])
    for strip, some, largest in zip(made.split(step), codes.split(step), scales.split(step), strict=True):
        strip.copy_(some * largest[:, None].float() / 127)
    return made
