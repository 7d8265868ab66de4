"""What random codes of a checkpoint's format mean, by transformers' functions: nothing of the engines is used."""

from typing import Any

from zi_experiments.models import expansion
from zi_experiments.models.native import Packed
from zi_experiments.models.packing import Code, Format


def dequantized(packed: Packed, format: Format, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return a parameter of this shape and 16-bit type."""
    import torch

    if format.code is Code.e2m1:
        blocks = packed.codes.unflatten(-1, (packed.scales.shape[-1], -1))
        return expansion.mxfp4(blocks, packed.scales, dtype).view(shape)
    of_matrix = _of_integers if format.code is Code.signed else _of_numbers
    found = torch.empty(shape, dtype=dtype, device=packed.codes.device)
    matrices = found.view(*packed.codes.shape[:2], -1)
    for matrix, codes, scales in zip(matrices, packed.codes, packed.scales, strict=True):
        matrix.copy_(of_matrix(codes, scales, format, dtype))
    return found


def _of_numbers(codes: Any, scales: Any, format: Format, dtype: Any) -> Any:
    import torch

    return expansion.fp8(codes.view(torch.float8_e4m3fn), scales, dtype, block=format.group)


def _of_integers(codes: Any, scales: Any, format: Format, dtype: Any) -> Any:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    how = {"type": "int", "symmetric": True, "strategy": "group", "group_size": format.group[1]}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=format.bits, **how))
    shape = torch.tensor([codes.shape[0], codes.shape[1] * 8 // format.bits])
    stored = {"weight_packed": codes.view(torch.int32), "weight_scale": scales, "weight_shape": shape}
    return expansion.compressed(dtype, "pack-quantized", scheme, **stored)
