"""GGUF files: one file with a model's configuration and its weights, in blocks of codes and scales.

transformers names and arranges the tensors; the package `gguf` reads the file and expands the blocks.
"""

from collections import Counter, defaultdict
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from zi_experiments.config.schema import ConfigError
from zi_experiments.models.causal_lm import empty_model
from zi_experiments.models.stored import Stored
from zi_experiments.quoting import printable, reason

_OTHER = "pass model.path=… of a folder with the model in safetensors, or weights=random"


def check(file: Path) -> None:
    """Raise `ConfigError` when a file cannot be read here: the package is missing, or the file is damaged."""
    if not file.is_file():
        raise ConfigError(f"{file} is not a file: pass model.path=/path/to/a/file.gguf")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ConfigError(f"{file} does not begin as a GGUF file: copy or download it again")
    if find_spec("gguf") is None:
        raise ConfigError(
            f"{file} is read by the package gguf: pip install gguf (pip install -e '.[checkpoints]' has all of them), "
            f"or {_OTHER}"
        )
    try:
        architecture, size, needed = _architecture(file), file.stat().st_size, _described_bytes(file)
    except Exception as error:  # a damaged file can raise any exception
        raise ConfigError(f"{file} is a damaged GGUF file ({reason(error)}): copy or download it again") from error
    if size < needed:
        raise ConfigError(
            f"{file} is truncated: it has {size} bytes, and {needed} by its own header: copy or download it again"
        )
    if not _is_read_whole(architecture):
        raise ConfigError(f"{file} is a GGUF file of {printable(architecture)}, which is not read here: {_OTHER}")


def _architecture(file: Path) -> str:
    from gguf import GGUFReader

    return str(GGUFReader(file).get_field("general.architecture").contents())


def _described_bytes(file: Path) -> int:
    from gguf import GGUFReader

    return max((int(one.data_offset + one.n_bytes) for one in GGUFReader(file).tensors), default=0)


def _is_read_whole(architecture: str) -> bool:
    """Return whether transformers reads a file by the names and arrangements that are used here."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return architecture.replace("-", "_") in {name.replace("-", "_") for name in GGUF_SUPPORTED_ARCHITECTURES}


def tensors(file: Path, config: Any, dtype: Any) -> dict[str, Stored]:
    """Return the tensors of a file by their names in a model of `config`; blocks are expanded when they are read."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    processor = TENSOR_PROCESSORS.get(_architecture(file), TensorProcessor)(config=config.get_text_config().to_dict())
    model = empty_model(config, file.name)
    names = get_gguf_hf_weights_map(model, processor)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    parts = defaultdict(list)
    for one in GGUFReader(file).tensors:
        # experts have no suffix in the model
        parts[names.get(one.name) or names.get(one.name.removesuffix(".weight"), one.name)].append(one)

    def stored(name: str) -> Stored:
        def read(device: Any, index: int | None) -> Any:
            whole = _read(parts[name], name, names, processor).to(device)
            return whole if index is None else whole[index : index + 1]

        elements = sum(int(part.n_elements) for part in parts[name])
        # transposed and permuted as the model has it; if not even the size fits, the shape in the file is compared
        shape = shapes.get(name, ())
        shape = shape if prod(shape) == elements and shape else tuple(map(int, reversed(parts[name][0].shape)))
        return Stored(shape=shape, dtype=dtype, nbytes=sum(int(part.n_bytes) for part in parts[name]), read=read)

    return {name: stored(name) for name in parts}


def _read(parts: list[Any], name: str, names: dict[str, str], processor: Any) -> Any:
    """Return a tensor of the model in float32, from the tensors of the file that it consists of."""
    import torch
    from gguf import dequantize

    made: dict[str, Any] = {}
    for part in parts:
        result = processor.process(
            weights=dequantize(part.data, part.tensor_type),
            name=part.name,
            tensor_key_mapping=names,
            parsed_parameters={"tensors": made},
        )
    return made[name] if name in made else torch.from_numpy(result.weights.copy())


def format_of(file: Path) -> str:
    """Return `gguf` and the type of most weights, for example `gguf (Q4_K)`."""
    from gguf import GGUFReader

    sizes: Counter[str] = Counter()
    for one in GGUFReader(file).tensors:
        sizes[one.tensor_type.name] += int(one.n_bytes)
    return f"gguf ({sizes.most_common(1)[0][0]})"
