"""The codes and scales of a checkpoint as they are in its files, for parameters that stay in the checkpoint's own format."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from zi_experiments.models.architecture import Parameter
from zi_experiments.models.conversion import Recipe
from zi_experiments.models.native import Packed
from zi_experiments.models.packing import Code, Packing
from zi_experiments.models.stored import Stored

# local names of codes and scales in the files, and of a tensor that is of no use beside them
_CODES = {Code.e4m3: "codes", Code.e2m1: "blocks", Code.signed: "weight_packed"}
_SCALES = {Code.e4m3: "scales", Code.e2m1: "scales", Code.signed: "weight_scale"}
_SHAPE = "weight_shape"
_EXPONENT_TYPES = ("torch.uint8", "torch.float8_e8m0fnu")
_CODE_TYPES = {Code.e4m3: "torch.float8_e4m3fn", Code.e2m1: "torch.uint8", Code.signed: "torch.int32"}


def as_held(
    parameters: Iterable[Parameter], recipes: Mapping[str, Recipe], tensors: Mapping[str, Stored]
) -> tuple[Parameter, ...]:
    """Return parameters with the formats in which the files really have them; None for what is not in a known one."""

    def held(p: Parameter) -> Packing | None:
        return packing_of(p.native, p.shape, recipes.get(p.name), tensors) if p.native else None

    return tuple(replace(p, native=held(p)) for p in parameters)


def read(
    packing: Packing, shape: tuple[int, ...], recipe: Recipe, tensors: Mapping[str, Stored], device: Any
) -> Packed:
    """Return codes and scales of a parameter of this shape, on a device."""
    import torch

    (matrices, rows, _), code = packing.codes(shape), packing.format.code
    codes, scales = [], []
    for name in _sources(packing, shape, recipe) or ():
        parts = tensors[name].parts or {}
        codes.append(parts[_CODES[code]].read(device, None).contiguous().view(torch.uint8).flatten())
        scale = parts[_SCALES[code]].read(device, None).contiguous()
        scales.append((scale.float() if packing.format.numbers == (4,) else scale).flatten())
    grid = packing.grid(shape)
    found = torch.cat(scales).view(matrices, *grid)
    exponents = packing.format.numbers == (1,)
    return Packed(
        codes=torch.cat(codes).view(matrices, rows, -1), scales=found.view(torch.uint8) if exponents else found
    )


def packing_of(
    packing: Packing, shape: tuple[int, ...], recipe: Recipe | None, tensors: Mapping[str, Stored]
) -> Packing | None:
    """Return how the files have a parameter of this shape that should be stored so; None if they have it otherwise."""
    names = _sources(packing, shape, recipe) if recipe else None
    if not names:
        return None
    code, each = packing.format.code, packing.codes(shape)[0] // len(names)
    (_, rows, columns), grid = packing.codes(shape), packing.grid(shape)
    kinds = set()
    for name in names:
        parts = tensors[name].parts or {}
        codes, scales = parts.get(_CODES[code]), parts.get(_SCALES[code])
        if codes is None or scales is None or len(parts) > 2 + (_SHAPE in parts):
            return None
        fits = codes.nbytes == each * rows * columns * packing.format.bits // 8 and scales.numel == each * prod(grid)
        if not fits or str(codes.dtype) != _CODE_TYPES[code]:
            return None
        kinds.add(str(scales.dtype) if code is Code.signed else str(scales.dtype) in _EXPONENT_TYPES)
    if len(kinds) > 1:
        return None
    # whatever the configuration says of how the scales of FP8 are stored
    numbers = (1 if kinds.pop() else 4,) if code is Code.e4m3 else packing.format.numbers
    return replace(packing, format=replace(packing.format, numbers=numbers))


def _sources(packing: Packing, shape: tuple[int, ...], recipe: Recipe) -> list[str] | None:
    """Return the names of the tensors with a parameter's matrices, in their order; None if it is made in another way."""
    operations = getattr(recipe.rule, "operations", ())
    if not operations and len(recipe.sources) == 1:
        ((_, names),) = recipe.sources
        return list(names) if len(names) == 1 else None
    if len(shape) != 3 or packing.transposed or not recipe.is_by_expert(shape[0]):
        return None
    if len(recipe.sources) != packing.parts or any(type(one).__name__ == "Transpose" for one in operations):
        return None
    by_pattern = dict(recipe.sources)
    ordered = [by_pattern[pattern] for pattern in recipe.rule.source_patterns if pattern in by_pattern]
    return [name for expert in zip(*ordered, strict=True) for name in expert]
