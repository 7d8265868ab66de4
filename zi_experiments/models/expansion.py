"""Quantized weights of a checkpoint become 16-bit tensors, on the device where their codes are.

Where transformers or compressed-tensors has the operation, it is theirs. GPTQ and AWQ are written from their published
layouts: the packages that have them do not install on every version of Python.
"""

from typing import Any

# the column that each of the eight 4-bit codes in a word of AWQ belongs to, from the lowest bits
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def fp8(codes: Any, scales: Any, dtype: Any, block: tuple[int, int] | None) -> Any:
    """Return FP8 weights (…, rows, columns), or FP4 codes two in a byte, times the scales of their blocks.

    transformers derives the size of the blocks from the numbers of rows and scales, and refuses or misreads a weight whose
    last block is not whole: such a weight is given to it in parts that consist of whole blocks.
    """
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    expand = Fp8Dequantize(None)._dequantize_one
    width = 1 if codes.dtype.is_floating_point else 2
    if block is None or not is_ragged(codes.shape, scales.shape, (block[0], block[1] // width)):
        return expand(codes, scales, output_dtype=dtype)
    rows, columns = block[0], block[1] // width
    made = torch.empty((*codes.shape[:-1], codes.shape[-1] * width), dtype=dtype, device=codes.device)
    for i, row in enumerate(range(0, codes.shape[-2], rows)):
        for j, column in enumerate(range(0, codes.shape[-1], columns)):
            part = codes[..., row : row + rows, column : column + columns]
            one = expand(part, scales[..., i : i + 1, j : j + 1], output_dtype=dtype)
            made[..., row : row + rows, column * width : (column + columns) * width] = one
    return made


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

    codes = _unpacked(qweight, bits).transpose(1, 2).flatten(0, 1)  # (inputs, outputs)
    zeros = _unpacked(qzeros, bits).flatten(1, 2) + offset
    if g_idx is None:
        g_idx = torch.arange(len(codes), device=codes.device) // (len(codes) // len(scales))
    g_idx = g_idx.long()
    return (scales.float()[g_idx] * (codes - zeros[g_idx])).t().contiguous().to(dtype)


def awq(qweight: Any, qzeros: Any, scales: Any, dtype: Any) -> Any:
    """Return a weight (outputs, inputs) of AWQ: scale · (code − zero), by group of inputs.

    `qweight` (inputs, outputs / 8) and `qzeros` (groups, outputs / 8) have the codes of eight outputs in a word, in an
    order of their own.
    """
    import torch

    order = torch.tensor(_AWQ_COLUMNS, device=qweight.device).argsort()
    codes, zeros = (_unpacked(words, 4)[..., order].flatten(1, 2) for words in (qweight, qzeros))
    size = len(codes) // len(scales)
    groups = codes.unflatten(0, (-1, size)) - zeros[:, None]
    return (scales.float()[:, None] * groups).flatten(0, 1).t().contiguous().to(dtype)


def _unpacked(words: Any, bits: int) -> Any:
    """Return the codes in words (…) of 32 bits, from the lowest bits: int32 of shape (…, 32 / bits)."""
    import torch

    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    return (words[..., None] >> shifts) & (2**bits - 1)
