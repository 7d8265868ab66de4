"""What weights in a checkpoint's own format are, by transformers' functions: nothing of the engines is used."""

from typing import Any

from zi_experiments.models.native import Packed
from zi_experiments.models.packing import Code, Format


def dequantized(packed: Packed, format: Format, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return a parameter of this shape and 16-bit type."""
    import torch

    if format.code is Code.e2m1:
        return _of_mxfp4(packed, dtype).view(shape)
    of_matrix = _of_integers if format.code is Code.signed else _of_blocks
    found = torch.empty(shape, dtype=dtype, device=packed.codes.device)
    matrices = found.view(*packed.codes.shape[:2], -1)
    for matrix, codes, scales in zip(matrices, packed.codes, packed.scales, strict=True):
        matrix.copy_(of_matrix(codes, scales, format, dtype))
    return found


def _of_blocks(codes: Any, scales: Any, format: Format, dtype: Any) -> Any:
    """Return a matrix. transformers divides it into equal blocks, so that those at its edges are made whole before."""
    import torch
    from torch.nn.functional import pad
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rows, columns = codes.shape
    room = scales.shape[1] * format.group[1] - columns, scales.shape[0] * format.group[0] - rows
    whole = pad(codes, (0, room[0], 0, room[1])).view(torch.float8_e4m3fn)
    return Fp8Dequantize(None)._dequantize_one(whole, scales, output_dtype=dtype)[:rows, :columns]


def _of_integers(codes: Any, scales: Any, format: Format, dtype: Any) -> Any:
    """Return a matrix as compressed-tensors decompresses it, which transformers has do it."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    how = {"type": "int", "symmetric": True, "strategy": "group", "group_size": format.group[1]}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=format.bits, **how))
    shape = torch.tensor([codes.shape[0], codes.shape[1] * 8 // format.bits])
    stored = {"weight_packed": codes.view(torch.int32), "weight_scale": scales, "weight_shape": shape}
    return BaseCompressor.get_value_from_registry("pack-quantized").decompress(stored, scheme)["weight"].to(dtype)


def _of_mxfp4(packed: Packed, dtype: Any) -> Any:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = packed.codes.unflatten(-1, (packed.scales.shape[-1], -1))
    return convert_moe_packed_tensors(blocks, packed.scales, dtype=dtype)
