"""The tensors of a checkpoint, as those of the 16-bit checkpoint that they stand for."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zi_experiments.models import formats, gguf_file, stored
from zi_experiments.models.checkpoint import Checkpoint
from zi_experiments.models.stored import Stored


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A checkpoint whose tensors can be read."""

    tensors: dict[str, Stored]  # by name, quantized ones as expanded
    names: dict[Path, set[str]]  # of the tensors in each file
    format: str  # the quantization method, or the type of most weights
    bits_per_parameter: float  # in the files
    is_quantized: bool
    is_of_transformers: bool  # whether plain transformers expands it too


def open_files(checkpoint: Checkpoint, config: Any, dtype: Any) -> Opened:
    """Return the tensors of a checkpoint of a model, quantized ones as they are when expanded to `dtype`."""
    if checkpoint.is_gguf:
        return _open_gguf(checkpoint.weights[0], config, dtype)
    files = {file: stored.in_file(file) for file in checkpoint.weights}
    found = {name: one for tensors in files.values() for name, one in tensors.items()}
    settings = settings_of(checkpoint.folder)
    tensors = found if settings is None else formats.expanded(settings, found, dtype, str(checkpoint.folder))
    return Opened(
        tensors=tensors,
        names={file: set(tensors) for file, tensors in files.items()},
        format=_type_of_most(found) if settings is None else formats.describe(settings),
        bits_per_parameter=formats.bits_per_parameter(found, tensors),
        is_quantized=settings is not None,
        is_of_transformers=settings is None or formats.is_of_transformers(settings, found),
    )


def _open_gguf(file: Path, config: Any, dtype: Any) -> Opened:
    tensors = gguf_file.tensors(file, config, dtype)
    return Opened(
        tensors=tensors,
        names={file: set(tensors)},
        format=gguf_file.format_of(file),
        bits_per_parameter=formats.bits_per_parameter(tensors, tensors),
        is_quantized=True,
        is_of_transformers=True,
    )


def settings_of(folder: Path) -> Mapping[str, Any] | None:
    """Return the `quantization_config` in a folder's `config.json`, or in its part for text; None: not quantized."""
    content = json.loads((folder / "config.json").read_bytes())
    found = content.get("quantization_config") or (content.get("text_config") or {}).get("quantization_config")
    return found or None


def _type_of_most(tensors: Mapping[str, Stored]) -> str:
    sizes: Counter[str] = Counter()
    for one in tensors.values():
        sizes[str(one.dtype).removeprefix("torch.")] += one.nbytes
    return sizes.most_common(1)[0][0] if sizes else "none"
