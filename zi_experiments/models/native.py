"""The formats in which models are published: how each parameter is stored, as `quantization_config` says.

Which parameters are quantized is what transformers reads from the same configuration.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import log2, sqrt
from typing import Any

from zi_experiments.models.packing import Code, Format, Packing

FORMATS = "block FP8 (quant_method fp8 with weight_block_size), MXFP4 (mxfp4) and INT4 in groups (compressed-tensors)"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # what each code means
_MXFP4 = Format(name="MXFP4", code=Code.e2m1, bits=4, group=(1, 32), numbers=(1,))


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """One parameter as checkpoints have it."""

    codes: Any  # uint8 of shape (matrices, rows, bytes of a row)
    scales: (
        Any  # of shape (matrices, groups in a column, groups in a row): float32, 16-bit, or uint8 if they are exponents
    )


def random(packing: Packing, shape: tuple[int, ...], dtype: Any, generator: Any) -> Packed:
    """Return random codes and scales of a parameter for runs in that 16-bit type, on the generator's device.

    All codes but NaN are drawn evenly. The weights have about the standard deviation 1/√columns.
    """
    import torch

    (matrices, rows, columns), format = packing.codes(shape), packing.format
    how: dict[str, Any] = {"generator": generator, "device": generator.device}
    codes = torch.randint(256, (matrices, rows, columns * format.bits // 8), dtype=torch.uint8, **how)
    if format.code is Code.e4m3:
        codes -= (codes & 127 == 127).to(torch.uint8)
    size = 1 / sqrt(columns) / _spread(format)
    grid = matrices, *packing.grid(shape)
    if format.numbers == (1,):
        middle = 127 + round(log2(size))
        return Packed(codes=codes, scales=torch.randint(middle - 1, middle + 2, grid, dtype=torch.uint8, **how))
    scales = size * (0.5 + torch.rand(grid, **how))
    return Packed(codes=codes, scales=scales.to(dtype) if format.numbers == (2,) else scales)


def _spread(format: Format) -> float:
    """Return the standard deviation of what all codes but NaN mean."""
    import torch

    if format.code is Code.e2m1:
        return sqrt(sum(number**2 for number in E2M1) / len(E2M1))
    if format.code is Code.signed:
        return float(2**format.bits / sqrt(12))
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return float(numbers[numbers.isfinite()].square().mean().sqrt())


def packings(model: Any, experts: dict[str, Any]) -> dict[str, Packing]:
    """Return how a checkpoint of `model`, on the meta device, stores its quantized parameters, by name.

    `experts` has the names of parameters that modules with transformers' interface for experts have for each expert.
    Nothing is returned for a format that is unknown here: quant=native is refused then.
    """
    stated = quantization(model.config)
    if stated.get("quant_method") == "mxfp4":
        return dict(_in_mxfp4(model, stated))
    if (blocks := _blocks(stated)) is not None:
        return dict(_in_blocks(model, stated, blocks, experts))
    if (groups := _groups(stated)) is not None:
        return dict(_in_groups(model, stated, groups, experts))
    return {}


def quantization(config: Any) -> dict[str, Any]:
    """Return what a configuration says of how weights are quantized; empty if it says nothing."""
    stated = getattr(config, "quantization_config", None)
    return stated if isinstance(stated, dict) else {}


def _blocks(stated: dict[str, Any]) -> Format | None:
    """Return the format of FP8 weights with a scale for each block; None if it is another one."""
    block = stated.get("weight_block_size")
    is_plain = stated.get("quant_method") in ("fp8", "mxfp8") and stated.get("expert_dtype", "fp8") == "fp8"
    if not is_plain or not isinstance(block, list | tuple) or len(block) != 2:
        return None
    if not all(isinstance(size, int) and size > 0 for size in block):
        return None
    scale_bytes = {"float": 4, "ue8m0": 1}.get(stated.get("scale_fmt") or "float")
    if scale_bytes is None:
        return None
    return Format(name="FP8", code=Code.e4m3, bits=8, group=(block[0], block[1]), numbers=(scale_bytes,))


def _groups(stated: dict[str, Any]) -> Format | None:
    """Return the format of compressed-tensors for integers with a scale for each group; None if it is another one."""
    schemes = stated.get("config_groups")
    if stated.get("quant_method") != "compressed-tensors" or not isinstance(schemes, dict) or len(schemes) != 1:
        return None
    (scheme,) = schemes.values()
    weights = scheme.get("weights") if isinstance(scheme, dict) else None
    if not isinstance(weights, dict) or (scheme.get("format") or stated.get("format")) != "pack-quantized":
        return None
    bits, size = weights.get("num_bits"), weights.get("group_size")
    wanted = {"type": "int", "strategy": "group", "symmetric": True}
    is_plain = all(weights.get(key) == value for key, value in wanted.items()) and not weights.get("actorder")
    if not is_plain or bits not in (4, 8) or not isinstance(size, int) or size < 1:
        return None
    return Format(name=f"INT{bits}", code=Code.signed, bits=bits, group=(1, size), numbers=(2,))


def _in_groups(
    model: Any, stated: dict[str, Any], format: Format, experts: dict[str, Any]
) -> Iterator[tuple[str, Packing]]:
    (scheme,) = stated["config_groups"].values()
    targets, ignored = (
        each if isinstance(each, list) else [] for each in (scheme.get("targets"), stated.get("ignore"))
    )

    def is_quantized(linear: str) -> bool:
        return _matches(linear, targets) and not _matches(linear, ignored)

    for name, packing in _linears(model, format, experts):
        owner, _, key = name.rpartition(".")
        # each expert is a linear layer in checkpoints
        linear = f"{owner}.0.{key.removeprefix('gate_')}" if name in experts else owner
        if is_quantized(linear):
            yield name, packing


def _matches(linear: str, patterns: list[Any]) -> bool:
    """Return whether patterns of compressed-tensors mean a linear layer: its class, its name, or an expression for names."""
    given = [str(pattern) for pattern in patterns]
    return (
        "Linear" in given
        or linear in given
        or any(re.match(pattern[3:], linear) for pattern in given if pattern.startswith("re:"))
    )


def _in_blocks(
    model: Any, stated: dict[str, Any], format: Format, experts: dict[str, Any]
) -> Iterator[tuple[str, Packing]]:
    converted = {name for name, _ in _converted(model, stated, "modules_to_not_convert", "ignored_layers")}
    for name, packing in _linears(model, format, experts):
        if name.rpartition(".")[0] in converted:
            yield name, packing


def _linears(model: Any, format: Format, experts: dict[str, Any]) -> Iterator[tuple[str, Packing]]:
    """Yield the weights of linear layers, and stacks of those of experts, as checkpoints in a format have them."""
    from torch import nn

    whole = Packing(format=format)
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            yield f"{name}.weight", whole
        for key, parameter in module._parameters.items():
            if f"{name}.{key}" not in experts or parameter.dim() != 3 or module.is_transposed:
                continue
            # checkpoints have the two halves of this stack as matrices of their own
            is_pair = key == "gate_up_proj" and module.has_gate
            yield f"{name}.{key}", Packing(format=format, parts=2) if is_pair else whole


def _in_mxfp4(model: Any, stated: dict[str, Any]) -> Iterator[tuple[str, Packing]]:
    for name, module in _converted(model, stated, "modules_to_not_convert"):
        if type(module).__name__ == "GptOssExperts":
            yield from (
                (f"{name}.{key}", Packing(format=_MXFP4, transposed=True)) for key in ("gate_up_proj", "down_proj")
            )


def _converted(model: Any, stated: dict[str, Any], *keys: str) -> Iterator[tuple[str, Any]]:
    """Yield name and module of those that are not left in 16 bits; the first of `keys` that is there names others."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = next((stated[key] for key in keys if stated.get(key) is not None), None)
    kept = HfQuantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
    for name, module in model.named_modules():
        if should_convert_module(name, kept):
            yield name, module
