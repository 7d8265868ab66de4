"""Formats of checkpoints whose weights are quantized already, and how each tensor of theirs becomes a 16-bit one.

A checkpoint is shown as the 16-bit one that it was made from: the tensors that belong to one weight (codes, scales, zero
points) become one `Stored` under the weight's own name, which is expanded when it is read.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from zi_experiments.config.schema import ConfigError
from zi_experiments.models import expansion
from zi_experiments.models.stored import Stored
from zi_experiments.quoting import printable

Tensors = dict[str, Stored]
METHOD = "quant_method"
# scales of activations and of the KV cache, which 16-bit passes do not use
_UNUSED = (
    "activation_scale", "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
    "k_scale", "v_scale", "kv_scale",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class _Format:
    """How the tensors of a quantization method are expanded."""

    # `find(settings, tensors, dtype)` → the expanded tensors by name, each with the names of the tensors it is made of
    find: Callable[[Mapping[str, Any], Tensors, Any], Iterator[tuple[str, Stored, list[str]]]]
    check: Callable[[Mapping[str, Any]], str | None] = lambda settings: None  # why settings cannot be expanded
    package: str | None = None  # that has to be installed
    # whether `AutoModelForCausalLM` expands it too, and as its specification says
    is_of_transformers: Callable[[Mapping[str, Any], Tensors], bool] = lambda settings, tensors: True


def method(settings: Mapping[str, Any]) -> str:
    """Return the quantization method of a configuration's `quantization_config`."""
    if settings.get("load_in_8bit") or settings.get("load_in_4bit"):
        return "bitsandbytes"  # as transformers takes it: older checkpoints name no method
    return str(settings.get(METHOD, "an unnamed method"))


def describe(settings: Mapping[str, Any]) -> str:
    """Return the method and the format within it."""
    within = settings.get("format") if method(settings) == "compressed-tensors" else settings.get("fmt")
    return f"{method(settings)} ({within})" if isinstance(within, str) else method(settings)


def is_of_transformers(settings: Mapping[str, Any], tensors: Tensors) -> bool:
    """Return whether plain transformers expands a checkpoint with those tensors too, and as its format says."""
    return _FORMATS[method(settings)].is_of_transformers(settings, tensors)


def check(settings: Mapping[str, Any], path: str) -> None:
    """Raise `ConfigError` when weights of that format cannot be expanded here."""
    name = printable(method(settings))
    way_out = "pass weights.path=… of a 16-bit checkpoint of the model, or weights=random"
    form = _FORMATS.get(name)
    if form is None:
        raise ConfigError(
            f"{path} holds weights that are quantized by {name}, which cannot be expanded to 16 bits here: {way_out}"
        )
    if form.package is not None and find_spec(form.package.replace("-", "_")) is None:
        raise ConfigError(
            f"{path} holds weights that are quantized by {name}, which the package {form.package} expands: "
            f"pip install {form.package} (pip install -e '.[checkpoints]' has all of them), or {way_out}"
        )
    if problem := form.check(settings):
        raise ConfigError(f"{path} holds weights that are quantized by {name} {printable(problem)}: {way_out}")


def expanded(settings: Mapping[str, Any], tensors: Tensors, dtype: Any, path: str) -> Tensors:
    """Return the tensors of a checkpoint with its quantized ones expanded to `dtype`, under their weights' names.

    Raises `ConfigError` when there are none.
    """
    found = dict(tensors)
    is_quantized = False
    for name, stored, made_of in _FORMATS[method(settings)].find(settings, tensors, dtype):
        for part in made_of:
            found.pop(part, None)
        found[name] = stored
        is_quantized = True
    if not is_quantized:
        raise ConfigError(
            f"{path} has no weights in the format that its config.json names, {printable(describe(settings))}: pass "
            "weights.path=… of a checkpoint with its own config.json, or weights=random"
        )
    return {name: stored for name, stored in found.items() if not name.endswith(tuple(f".{one}" for one in _UNUSED))}


def _expanding(
    shape: tuple[int, ...], dtype: Any, parts: dict[str, Stored], expand: Callable[..., Any], by_expert: bool = False
) -> Stored:
    """Return the tensor that `expand` makes of its parts, given by their local names, once they are on the device."""

    def read(device: Any, index: int | None) -> Any:
        part = index if by_expert else None
        held = {name.replace(".", "_"): stored.read(device, part) for name, stored in parts.items()}
        made = expand(**held, dtype=dtype)
        return made if index is None or by_expert else made[index : index + 1]

    nbytes = sum(part.nbytes for part in parts.values())
    return Stored(shape=shape, dtype=dtype, nbytes=nbytes, read=read, parts=parts)


# --- block FP8 and MXFP8: DeepSeek-V3, MiniMax, Qwen -------------------------------------------------------------------


def _fp8(settings: Mapping[str, Any], tensors: Tensors, dtype: Any) -> Iterator[tuple[str, Stored, list[str]]]:
    block = settings.get("weight_block_size")
    for name, weight in tensors.items():
        stem = name.removesuffix(".weight")
        scales = next(
            (one for one in (f"{name}_scale_inv", f"{stem}.scale", f"{stem}.qscale_weight") if one in tensors), None
        )
        if scales is None or scales == name:
            continue
        width = 2 if weight.dtype.is_floating_point is False else 1  # two FP4 codes in a byte
        shape = (*weight.shape[:-1], weight.shape[-1] * width)
        parts = {"codes": weight, "scales": tensors[scales]}
        expand = partial(expansion.fp8, block=tuple(block) if block else None)
        yield name, _expanding(shape, dtype, parts, expand, len(shape) == 3), [scales]


def _fp8_is_whole(settings: Mapping[str, Any], tensors: Tensors) -> bool:
    """Return whether blocks divide all weights; transformers misreads the others."""
    block = settings.get("weight_block_size")
    scales = {name: f"{name}_scale_inv" for name in tensors if f"{name}_scale_inv" in tensors}
    return block is None or not any(
        expansion.is_ragged(tensors[name].shape, tensors[scale].shape, tuple(block)) for name, scale in scales.items()
    )


# --- MXFP4: gpt-oss --------------------------------------------------------------------------------------------------


def _mxfp4(settings: Mapping[str, Any], tensors: Tensors, dtype: Any) -> Iterator[tuple[str, Stored, list[str]]]:
    for blocks, stored in tensors.items():
        name = blocks.removesuffix("_blocks")
        scales = f"{name}_scales"
        if name == blocks or scales not in tensors:
            continue
        *leading, rows, groups, size = stored.shape
        parts = {"blocks": stored, "scales": tensors[scales]}
        shape = (*leading, groups * size * 2, rows)
        yield name, _expanding(shape, dtype, parts, expansion.mxfp4, by_expert=True), [blocks, scales]


# --- compressed-tensors: Kimi K2 and what llm-compressor writes --------------------------------------------------------

_COMPRESSED = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape")


def _compressed_problem(settings: Mapping[str, Any]) -> str | None:
    from compressed_tensors.compressors import BaseCompressor

    groups = (settings.get("config_groups") or {}).values()
    for form in {settings.get("format"), *(group.get("format") for group in groups)} - {None}:
        if form not in BaseCompressor.registered_names():
            return f"in the format {form}, which this version of compressed-tensors does not expand"
    if any(((group.get("weights") or {}).get("actorder")) == "group" for group in groups):
        return "with reordered columns (actorder=group), which this version of compressed-tensors does not expand"
    return None


def _compressed(settings: Mapping[str, Any], tensors: Tensors, dtype: Any) -> Iterator[tuple[str, Stored, list[str]]]:
    from compressed_tensors.quantization import QuantizationConfig

    keys = ("config_groups", "format", "ignore", METHOD, "quantization_status")
    config = QuantizationConfig.model_validate({key: settings[key] for key in keys if key in settings})
    for scale in [name for name in tensors if name.endswith(".weight_scale")]:
        module = scale.removesuffix(".weight_scale")
        parts = {one: tensors[f"{module}.{one}"] for one in _COMPRESSED if f"{module}.{one}" in tensors}
        if not parts.keys() & {"weight", "weight_packed"}:
            continue
        scheme = _scheme(config, module)
        expand = partial(expansion.compressed, form=scheme.format or config.format, scheme=scheme)
        shape = _compressed_shape(parts, scheme)
        yield f"{module}.weight", _expanding(shape, dtype, parts, expand), [f"{module}.{one}" for one in parts]


def _scheme(config: Any, module: str) -> Any:
    """Return the scheme of a module: of the group that targets its name, else of the one that targets its class."""
    groups = list(config.config_groups.values())
    for group in groups:
        for target in group.targets:
            pattern = target.removeprefix("re:") if target.startswith("re:") else f"(.*\\.)?{re.escape(target)}$"
            if re.match(pattern, module):
                return group
    by_class = [group for group in groups if any(not target.startswith("re:") for target in group.targets)]
    return (by_class or groups)[0]


def _compressed_shape(parts: dict[str, Stored], scheme: Any) -> tuple[int, ...]:
    if "weight" in parts:
        return parts["weight"].shape
    if "weight_shape" in parts:
        *_, columns = parts["weight_packed"].shape
        exact = columns * 32 // scheme.weights.num_bits  # of what the words can hold
        if 32 % scheme.weights.num_bits == 0 and scheme.weights.group_size and exact % scheme.weights.group_size == 0:
            return (*parts["weight_packed"].shape[:-1], exact)
        return tuple(parts["weight_shape"].read("cpu", None).tolist())
    packed = parts["weight_packed"]  # MXFP4, NVFP4: two codes in a byte
    return (*packed.shape[:-1], packed.shape[-1] * 2)


# --- GPTQ and AWQ: codes in words of 32 bits ---------------------------------------------------------------------------


def _gptq_problem(settings: Mapping[str, Any]) -> str | None:
    if settings.get("bits") not in (2, 4, 8):
        return f"with bits={settings.get('bits')}, of which the codes are not packed in words of 32 bits"
    if settings.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        return f"in the format {settings['checkpoint_format']}"
    return None


def _gptq(settings: Mapping[str, Any], tensors: Tensors, dtype: Any) -> Iterator[tuple[str, Stored, list[str]]]:
    offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    expand = partial(expansion.gptq, bits=settings["bits"], offset=offset)
    for module, parts in _words(tensors, ("qweight", "qzeros", "scales", "g_idx")):
        words, columns = parts["qweight"].shape
        shape = (columns, words * 32 // settings["bits"])
        yield f"{module}.weight", _expanding(shape, dtype, parts, expand), [f"{module}.{one}" for one in parts]


def _awq_problem(settings: Mapping[str, Any]) -> str | None:
    if settings.get("bits", settings.get("w_bit")) != 4 or settings.get("version", "gemm") not in ("gemm", "GEMM"):
        return f"with bits={settings.get('bits', settings.get('w_bit'))} and version={settings.get('version')}"
    return None


def _awq(settings: Mapping[str, Any], tensors: Tensors, dtype: Any) -> Iterator[tuple[str, Stored, list[str]]]:
    for module, parts in _words(tensors, ("qweight", "qzeros", "scales")):
        rows, words = parts["qweight"].shape
        shape = (words * 8, rows)
        yield f"{module}.weight", _expanding(shape, dtype, parts, expansion.awq), [f"{module}.{one}" for one in parts]


def _words(tensors: Tensors, names: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Stored]]]:
    """Yield each module with packed weights, and its tensors of those local names."""
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        yield module, {one: tensors[f"{module}.{one}"] for one in names if f"{module}.{one}" in tensors}


# --- bitsandbytes ------------------------------------------------------------------------------------------------------

_STATE = ".quant_state.bitsandbytes__"


def _bitsandbytes(settings: Mapping[str, Any], tensors: Tensors, dtype: Any) -> Iterator[tuple[str, Stored, list[str]]]:
    for scales in [name for name in tensors if name.endswith(".SCB")]:
        module = scales.removesuffix(".SCB")
        weight, layout = f"{module}.weight", f"{module}.weight_format"
        parts = {"codes": tensors[weight], "scales": tensors[scales]}
        made_of = [name for name in (scales, layout) if name in tensors]
        yield weight, _expanding(tensors[weight].shape, dtype, parts, expansion.bitsandbytes_8bit), made_of
    for state in [name for name in tensors if _STATE in name]:
        weight = state.partition(_STATE)[0]
        names = {one: f"{weight}.{one}" for one in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
        held = {one: tensors[name] for one, name in names.items() if name in tensors}
        stated = json.loads(bytes(tensors[state].read("cpu", None).tolist()))
        shape = tuple(stated["shape"])
        expand = partial(expansion.bitsandbytes_4bit, shape=shape, stated=stated)
        made_of = [state, *(names[one] for one in held)]
        yield weight, _expanding(shape, dtype, {"codes": tensors[weight]} | held, expand), made_of


def _never(settings: Mapping[str, Any], tensors: Tensors) -> bool:
    return False


_FORMATS = {
    "fp8": _Format(find=_fp8, is_of_transformers=_fp8_is_whole),
    "mxfp8": _Format(find=_fp8, is_of_transformers=_fp8_is_whole),
    "mxfp4": _Format(find=_mxfp4),
    "compressed-tensors": _Format(find=_compressed, check=_compressed_problem, package="compressed-tensors"),
    "gptq": _Format(find=_gptq, check=_gptq_problem, is_of_transformers=_never),
    "awq": _Format(find=_awq, check=_awq_problem, is_of_transformers=_never),
    "bitsandbytes": _Format(find=_bitsandbytes, is_of_transformers=_never),
}


def bits_per_parameter(tensors: Tensors, as_expanded: Tensors) -> float:
    """Return the bits that the files have for each parameter, scales included."""
    return 8 * sum(one.nbytes for one in tensors.values()) / sum(one.numel for one in as_expanded.values())
