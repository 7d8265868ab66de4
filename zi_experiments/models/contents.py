"""Compare the tensors of a checkpoint with the model, before anything is loaded.

Only the headers of its files are read. Tensor data is read only to compare two tensors that have to be equal: tied by the
configuration, or stored under one name in two files.
"""

import re
from collections.abc import Collection
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from zi_experiments.config.schema import ConfigError, Run
from zi_experiments.models import architecture, checkpoint, weights
from zi_experiments.models.architecture import Architecture, local_or_hub, model_class, printable, quietly, reason
from zi_experiments.models.checkpoint import Checkpoint

# quantization methods that transformers expands to 16 bits while it loads, and that are tested here
EXPANDED = ("fp8", "mxfp4")
# causal masks that older versions of transformers stored; for some families it reports them as unexpected
_MASKS = re.compile(r"\.attn\.((attention\.)?(masked_)?bias|causal_mask)$")
_MOST_NAMES = 4  # of tensors in one message
Tensors = dict[str, Any]  # by name in a file


def load(run: Run) -> Architecture:
    """Return the architecture of a run's model; with `weights=pretrained`, adapted to the checkpoint's tensors.

    Raises `ConfigError` for unexpected or missing tensors and tensors of wrong shapes, and for other invalid files that
    keep transformers from loading the checkpoint.
    """
    found = architecture.load(run)
    path = run.weights.path
    if path is None:
        _forget_quantization(found.config)
        return found
    checkpoint.check(path)
    _expand_quantization(found.config, path)
    stored = _stored(path, found.config)
    if stored is None:
        return found
    _check_generation(path, stored.folder)
    return _held(found, stored, path, run.model.name)


def quantization(config: Any) -> str | None:
    """Return the method by which a checkpoint's weights are already quantized; None: they are not."""
    stored = getattr(config, "quantization_config", None)
    return str(stored.get("quant_method", "an unnamed method")) if stored is not None else None


def _forget_quantization(config: Any) -> None:
    # random weights are made in 16 bits
    if quantization(config) is not None:
        del config.quantization_config


def _expand_quantization(config: Any, path: str) -> None:
    method = quantization(config)
    if method is None:
        return
    if method not in EXPANDED:
        raise ConfigError(
            f"{path} holds weights that are quantized by {printable(method)}, which cannot be expanded to 16 bits here: "
            "pass weights.path=… of a 16-bit checkpoint of the model, or weights=random"
        )
    # otherwise transformers computes with the quantized weights on some GPUs
    config.quantization_config |= {"dequantize": True}


def _stored(path: str, config: Any) -> Checkpoint | None:
    """Return the checkpoint in a folder, or of a hub name if it is complete in the hub's cache; else None."""
    from huggingface_hub import try_to_load_from_cache

    if Path(local_or_hub(path)).is_dir():
        return checkpoint.find(path)
    cached = try_to_load_from_cache(path, "config.json", revision=getattr(config, "_commit_hash", None))
    with suppress(ConfigError):  # incomplete: transformers downloads the rest, or raises
        return checkpoint.find(str(Path(cached).parent)) if isinstance(cached, str) else None
    return None


def _check_generation(path: str, folder: Path) -> None:
    """Raise `ConfigError` if transformers cannot load the checkpoint because of its `generation_config.json`."""
    from transformers import GenerationConfig

    try:
        with quietly():
            GenerationConfig.from_pretrained(folder)
    except OSError:
        pass  # missing or not JSON: transformers works without it
    except Exception as error:
        raise ConfigError(
            f"{path}: transformers refuses its generation_config.json ({reason(error)}): "
            "pass weights.path=… of a checkpoint with another or without one, or weights=random"
        ) from error


def _held(found: Architecture, stored: Checkpoint, path: str, name: str) -> Architecture:
    headers = {file: _headers(file) for file in stored.weights}
    _check_index(path, stored.index, headers)
    model, report, ignored = _loaded_without_data(found.config, headers, path)
    _refuse(path, report)
    if any(not _are_equal(headers, *names) for names in _tied_twice(model, headers)):
        config = deepcopy(found.config)
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        found = architecture.describe(config, name)
    return replace(found, ignored_tensors=tuple(sorted(ignored)))


def _check_index(path: str, index: dict[str, Path], headers: dict[Path, Tensors]) -> None:
    """Raise `ConfigError` if the index leads to other tensors than those that plain transformers loads.

    transformers follows the index only when it reads weights in place. Otherwise it loads all tensors in the files; if two
    have the same name, that of the last file.
    """
    last = {name: file for file, tensors in headers.items() for name in tensors}
    for name, file in index.items():
        other = last.get(name, file)
        if other == file or other.suffix != ".safetensors":
            continue
        is_twice = name in headers[file]
        if not is_twice or not _same(_tensor(file, name), _tensor(other, name)):
            raise ConfigError(
                f"{path}: its index names {printable(file.name)} for {printable(name)}, but "
                f"{printable(other.name)} has {'another tensor of that name' if is_twice else 'it'}: "
                "pass weights.path=… of a checkpoint saved anew with save_pretrained, or weights=random"
            )


def _headers(file: Path) -> Tensors:
    """Return the tensors of a file, on the meta device."""
    import torch
    from safetensors import safe_open
    from transformers.modeling_utils import load_state_dict

    if file.suffix != ".safetensors":
        with torch.serialization.skip_data():  # as in checkpoint.py: meta alone may read the tensors
            pickled: Tensors = load_state_dict(file, map_location="meta")
        return pickled
    with safe_open(file, framework="numpy") as opened:  # torch maps files as writable, which needs free memory
        names = opened.keys()
        return {name: _without_data(opened.get_slice(name)) for name in names}


def _without_data(part: Any) -> Any:
    import torch
    from transformers.modeling_utils import str_to_torch_dtype

    dtype = str_to_torch_dtype.get(part.get_dtype(), torch.uint8)  # if torch lacks the type, only the shape counts
    return torch.empty(part.get_shape(), dtype=dtype, device="meta")


def _loaded_without_data(config: Any, headers: dict[Path, Tensors], path: str) -> tuple[Any, dict[str, Any], set[str]]:
    """Return the model on the meta device, transformers' loading report, and the tensors that it ignores on purpose."""
    import torch

    plain = model_class(config)
    ignored: set[str] = set()

    def adjust(self: Any, loading_info: Any) -> None:
        before = set(loading_info.unexpected_keys)
        plain._adjust_missing_and_unexpected_keys(self, loading_info)
        loading_info.unexpected_keys -= {name for name in loading_info.unexpected_keys if _MASKS.search(name)}
        ignored.update(before - loading_info.unexpected_keys)

    # keeps the name, by which transformers finds its conversions
    observed: Any = type(
        plain.__name__, (plain,), {"_adjust_missing_and_unexpected_keys": adjust, "__module__": plain.__module__}
    )
    try:
        with weights.without_zero3(), quietly():
            model, report = observed.from_pretrained(
                None,
                config=config,
                state_dict={name: meta for tensors in headers.values() for name, meta in tensors.items()},
                dtype=torch.bfloat16,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,  # the report lists them
                output_loading_info=True,
            )
    except Exception as error:
        raise ConfigError(
            f"{path} cannot be loaded as {plain.__name__} ({reason(error)}): "
            "pass weights.path=… of another checkpoint, or weights=random"
        ) from error
    return model, report, ignored


def _refuse(path: str, report: dict[str, Any]) -> None:
    """Raise `ConfigError` when transformers would initialise missing weights, or leave some out."""
    if lacking := report["missing_keys"]:
        raise ConfigError(
            f"{path} lacks tensors that its config.json asks for ({_listed(lacking)}): "
            "pass weights.path=… of a checkpoint that has them, or weights=random"
        )
    if different := report["mismatched_keys"]:
        shapes = [f"{name} {list(stored)} where the model has {list(expected)}" for name, stored, expected in different]
        raise ConfigError(
            f"{path} has tensors of other shapes than its config.json asks for ({_listed(shapes)}): "
            "pass weights.path=… of a checkpoint with its own config.json, or weights=random"
        )
    if unused := report["unexpected_keys"]:
        raise ConfigError(
            f"{path} has tensors that a model of its config.json would leave out ({_listed(unused)}): "
            "pass weights.path=… of a checkpoint with its own config.json, or weights=random"
        )


def _listed(texts: Collection[str]) -> str:
    first = printable(", ".join(sorted(texts)[:_MOST_NAMES]))
    return f"{first} and {len(texts) - _MOST_NAMES} more" if len(texts) > _MOST_NAMES else first


def _tied_twice(model: Any, headers: dict[Path, Tensors]) -> list[tuple[str, str]]:
    """Return pairs of tensor names that the configuration ties to one parameter, but that are both stored in the files.

    Without data, transformers cannot tell whether the two are equal, and does not tie them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    pairs = [
        (target, source)
        for target, source in model.all_tied_weights_keys.items()
        if model.get_parameter(target) is not model.get_parameter(source)
    ]
    if not pairs:
        return []
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    state, prefix = model.state_dict(), model.base_model_prefix
    stored = {
        rename_source_key(name, renamings, [], prefix, state)[0]: name
        for tensors in headers.values()
        for name in tensors
    }
    return [(stored[target], stored[source]) for target, source in pairs]


def _are_equal(headers: dict[Path, Tensors], *names: str) -> bool:
    """Return whether the tensors of two names have the same values; the files are mapped into memory."""
    one, other = (_tensor(next(file for file, tensors in headers.items() if name in tensors), name) for name in names)
    return _same(one, other)


def _same(one: Any, other: Any) -> bool:
    import torch

    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _tensor(file: Path, name: str) -> Any:
    from safetensors import safe_open
    from transformers.modeling_utils import load_state_dict

    if file.suffix != ".safetensors":
        return load_state_dict(file)[name]
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)
