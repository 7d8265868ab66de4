"""Compare the tensors of a checkpoint with the model, before anything is loaded.

Only the headers of its files are read. Tensor data is read only to compare two tensors that have to be equal: tied by the
configuration, or stored under one name in two files.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from zi_experiments.config.schema import ConfigError, Run
from zi_experiments.models import (
    checkpoint,
    conversion,
    description,
    formats,
    gguf_file,
    native_files,
    opening,
    stored,
)
from zi_experiments.models.architecture import Architecture, StoredAs
from zi_experiments.models.causal_lm import model_class, quietly
from zi_experiments.models.checkpoint import Checkpoint
from zi_experiments.models.configuration import is_gguf, local_or_hub
from zi_experiments.models.conversion import Resolved
from zi_experiments.models.opening import Opened
from zi_experiments.quoting import printable, reason

_MOST_NAMES = 4  # of tensors in one message


def load(run: Run) -> Architecture:
    """Return the architecture of a run's model; with `weights=pretrained`, adapted to the checkpoint's tensors.

    Raises `ConfigError` for unexpected or missing tensors and tensors of wrong shapes, and for other invalid files that
    keep transformers from loading the checkpoint.
    """
    import torch

    for named in (run.model.path, run.weights.path):
        if named is not None and is_gguf(named):
            gguf_file.check(Path(local_or_hub(named)))
    found = description.load(run)
    path = run.weights.path
    settings = _forget_quantization(found.config)
    if path is None:
        return replace(found, notes=(*found.notes, *_dropped(settings, run)))
    checkpoint.check(path)
    if settings is not None:
        formats.check(settings, path)
    files = _files(path, found.config)
    if files is None:
        return _noted(found, _stored_as(settings, None))
    if not files.is_gguf:
        _check_generation(path, files.folder)
    opened = opening.open_files(files, found.config, torch.bfloat16)
    held = _held(found, files, opened, path, run.model.name)
    return _noted(held, _stored_as(settings, opened))


def _noted(found: Architecture, stored: StoredAs | None) -> Architecture:
    """Return the architecture with how its weights are stored, and a note if verification expands them as the engine does."""
    if stored is None or stored.is_expanded_by_transformers:
        return replace(found, stored=stored)
    note = (
        f"transformers does not expand weights in {printable(stored.format)} as they are stored here: verification expands "
        "them by the code that the engine has, and compares all the rest"
    )
    return replace(found, stored=stored, notes=(*found.notes, note))


def _stored_as(settings: Mapping[str, Any] | None, opened: Opened | None) -> StoredAs | None:
    if opened is not None:
        return StoredAs(
            format=opened.format,
            bits_per_parameter=opened.bits_per_parameter,
            is_quantized=opened.is_quantized,
            is_expanded_by_transformers=opened.is_of_transformers,
        )
    if settings is None:
        return None
    # on the hub; whether transformers expands it is seen when its files are here
    return StoredAs(
        format=formats.describe(settings),
        bits_per_parameter=None,
        is_quantized=True,
        is_expanded_by_transformers=formats.is_of_transformers(settings, {}),
    )


def _dropped(settings: Mapping[str, Any] | None, run: Run) -> Iterator[str]:
    if settings is not None and not run.quant.is_native:
        yield (
            f"the model is published with weights quantized by {printable(formats.describe(settings))}: "
            "random weights are made in 16 bits, and quantized as quant says"
        )


def _forget_quantization(config: Any) -> Mapping[str, Any] | None:
    """Return how a checkpoint's weights are quantized already, and remove it from the configuration; None: they are not.

    Engines get plain 16-bit weights. transformers would otherwise compute with the quantized ones on some GPUs.
    """
    found = None
    for part in (config.get_text_config(), config):
        if (settings := getattr(part, "quantization_config", None)) is not None:
            found = settings if isinstance(settings, Mapping) else settings.to_dict()
            del part.quantization_config
    return found


def _files(path: str, config: Any) -> Checkpoint | None:
    """Return the checkpoint in a folder, or of a hub name if it is complete in the hub's cache; else None."""
    from huggingface_hub import try_to_load_from_cache

    if Path(local_or_hub(path)).exists():
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


def _held(found: Architecture, files: Checkpoint, opened: Opened, path: str, name: str) -> Architecture:
    _check_index(path, files.index, opened.names)
    resolved = _resolved(found.config, opened, path)
    _refuse(path, resolved.report)
    parameters = native_files.as_held(found.parameters, resolved.recipes, opened.tensors)
    if any(not _are_equal(resolved, opened, *names) for names in _tied_twice(resolved)):
        config = deepcopy(found.config)
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        found = description.describe(config, name)
        formats_of = {p.name: p.native for p in parameters}
        parameters = tuple(replace(p, native=formats_of.get(p.name)) for p in found.parameters)
    return replace(found, parameters=parameters, ignored_tensors=tuple(sorted(resolved.ignored)))


def _check_index(path: str, index: dict[str, Path], names: dict[Path, set[str]]) -> None:
    """Raise `ConfigError` if the index leads to other tensors than those that plain transformers loads.

    transformers follows the index only when it reads weights in place. Otherwise it loads all tensors in the files; if two
    have the same name, that of the last file.
    """
    last = {name: file for file, within in names.items() for name in within}
    for name, file in index.items():
        other = last.get(name, file)
        if other == file or other.suffix != ".safetensors":
            continue
        is_twice = name in names[file]
        if not is_twice or not _same(*(stored.in_file(one)[name].read("cpu", None) for one in (file, other))):
            raise ConfigError(
                f"{path}: its index names {printable(file.name)} for {printable(name)}, but "
                f"{printable(other.name)} has {'another tensor of that name' if is_twice else 'it'}: "
                "pass weights.path=… of a checkpoint saved anew with save_pretrained, or weights=random"
            )


def _resolved(config: Any, opened: Opened, path: str) -> Resolved:
    import torch

    try:
        return conversion.resolve(config, opened.tensors, torch.bfloat16)
    except Exception as error:
        raise ConfigError(
            f"{path} cannot be loaded as {model_class(config).__name__} ({reason(error)}): "
            "pass weights.path=… of another checkpoint, or weights=random"
        ) from error


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


def _tied_twice(resolved: Resolved) -> list[tuple[str, str]]:
    """Return pairs of parameters that the configuration ties to one, but that are both stored in the files.

    Without data, transformers cannot tell whether the two are equal, and does not tie them.
    """
    model, recipes = resolved.model, resolved.recipes
    return [
        (target, source)
        for target, source in model.all_tied_weights_keys.items()
        if model.get_parameter(target) is not model.get_parameter(source) and {target, source} <= recipes.keys()
    ]


def _are_equal(resolved: Resolved, opened: Opened, *names: str) -> bool:
    """Return whether two parameters have the same values; the files are mapped into memory."""
    one, other = (resolved.recipes[name].make(resolved.model, opened.tensors, "cpu")[name] for name in names)
    return _same(one, other)


def _same(one: Any, other: Any) -> bool:
    import torch

    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
