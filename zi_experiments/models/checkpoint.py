"""Find and validate the files of a checkpoint in a local folder, before it is loaded.

A checkpoint is untrusted: none of its code is run here, and no tensor data is read.
"""

import json
import os
import pickle
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zi_experiments.config.schema import ConfigError
from zi_experiments.models import gguf_file
from zi_experiments.models.configuration import local_or_hub
from zi_experiments.models.hub import WEIGHT_FILES
from zi_experiments.quoting import printable, reason

_DISTRIBUTED = "shard-[0-9]*-model-*.safetensors"
_LARGEST_HEADER = 100_000_000  # bytes of JSON that safetensors accepts


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The files of a model folder that transformers reads."""

    folder: Path
    weights: tuple[Path, ...]
    index: dict[str, Path] = field(default_factory=dict)  # file of each tensor, if there are several checkpoint shards

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that determine what the model computes; a GGUF file has the configuration too."""
        return self.weights if self.is_gguf else (self.folder / "config.json", *self.weights)

    @property
    def is_gguf(self) -> bool:
        return self.weights[0].suffix == ".gguf"

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def find(path: str) -> Checkpoint | None:
    """Return the checkpoint in a folder; None for a name on the hub, whose files are not here yet.

    Raises `ConfigError` when it has no weights, or an index that names missing files or files outside the folder.
    """
    folder = Path(local_or_hub(path))
    if folder.is_file():
        return Checkpoint(folder=folder.parent, weights=(folder,))
    if not folder.is_dir():
        return None
    if distributed := next(folder.glob(_DISTRIBUTED), None):  # newer versions of transformers would load it first
        raise ConfigError(
            f"{folder} is a distributed checkpoint ({printable(distributed.name)}): save it whole with save_pretrained, "
            "and pass weights.path=… of that"
        )
    names = _named_in_config(folder / "config.json") or WEIGHT_FILES
    found = next((folder / name for name in names if os.path.isfile(folder / name)), None)
    if found is None:
        raise ConfigError(
            f"{folder} has no weights ({', '.join(names)}): pass weights.path=… of a folder with some, or weights=random"
        )
    if found.suffix != ".json":
        return Checkpoint(folder=folder, weights=(found,))
    index = _index(found)
    return Checkpoint(folder=folder, weights=tuple(sorted(set(index.values()))), index=index)


def _named_in_config(config: Path) -> tuple[str, ...]:
    """Return the only file name that transformers looks for if `config.json` sets it; else nothing."""
    try:
        name = json.loads(config.read_bytes()).get("transformers_weights")
    except (OSError, ValueError, RecursionError, AttributeError):
        return ()  # the error is reported when the configuration is read
    return () if name is None else (_beside(config, name),)


def _index(index: Path) -> dict[str, Path]:
    """Return the file of each tensor, by the tensor's name."""
    try:
        content = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{index} is not JSON ({reason(error)}): copy or download it again") from error
    for key in ("weight_map", "metadata"):
        if not isinstance(content, dict) or not isinstance(content.get(key), dict) or not content["weight_map"]:
            raise ConfigError(f"{index} has no {key}: download it again, or save the model again with save_pretrained")
    files = {tensor: _beside(index, name) for tensor, name in content["weight_map"].items()}
    names = sorted(set(files.values()))
    if missing := [name for name in names if not os.path.isfile(index.parent / name)]:
        raise ConfigError(
            f"{index.parent} lacks {len(missing)} of the {len(names)} files that {index.name} names "
            f"({printable(', '.join(missing[:4]))}{' …' if len(missing) > 4 else ''}): copy or download them again"
        )
    return {tensor: index.parent / name for tensor, name in files.items()}


def _beside(file: Path, name: Any) -> str:
    """Return `name`, which `file` mentions, if it is a file name in the same folder. Raises `ConfigError` otherwise."""
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        raise ConfigError(
            f"{file} names '{printable(str(name))}', which is not a file in its own folder and is not read: "
            "pass weights.path=… of a checkpoint that you trust"
        )
    return name


def check(path: str) -> None:
    """Raise `ConfigError` for a checkpoint that is incomplete or damaged, or whose weight files would run code.

    Reads the headers, not the tensors.
    """
    found = find(path)
    for file in found.weights if found is not None else ():
        try:
            with file.open("rb") as opened:
                head = opened.read(40)
            if head.startswith(b"version https://git-lfs"):
                raise ConfigError(f"{file} is only a Git LFS pointer to the weights: git lfs pull")
            _CHECKS.get(file.suffix, _check_pickle)(file)
        except OSError as error:
            raise ConfigError(
                f"{file} cannot be read ({error.strerror}): pass weights.path=… of one that can"
            ) from error


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):  # torch maps files as writable, which needs free memory
            pass
    except SafetensorError as error:
        size, needed = file.stat().st_size, _described_bytes(file)
        if needed is not None and needed != size:
            state = "truncated" if size < needed else "too long"
            problem = f"{state}: it has {size} bytes, and {needed} by its own header"
        elif size < 8:
            problem = f"truncated: it has {size} bytes"
        else:
            problem = f"no safetensors file of {size} bytes ({reason(error)})"
        raise ConfigError(f"{file} is {problem}: copy or download it again") from error


def _described_bytes(file: Path) -> int | None:
    """Return the file size that a safetensors header implies, or None if it is invalid.

    A file is 8 bytes with the length of a JSON header, the header, and the tensors.
    """
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
        if header > _LARGEST_HEADER:
            return None
        text = opened.read(header)
    if len(text) < header:
        return 8 + header
    try:
        tensors = [value for name, value in json.loads(text).items() if name != "__metadata__"]
        return 8 + header + max((int(tensor["data_offsets"][1]) for tensor in tensors), default=0)
    except Exception:  # the header may contain anything
        return None


def _check_pickle(file: Path) -> None:
    import torch

    try:
        # skip_data as well as meta: of files from before torch 1.6, meta alone would read the tensors
        with torch.serialization.skip_data(), warnings.catch_warnings(action="ignore"):
            torch.load(file, weights_only=True, map_location="meta")
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        what = f"code ({printable(called[1])})" if called else "code, or objects other than tensors"
        raise ConfigError(
            f"{file} holds {what}, which is not run: convert it to safetensors where that may be done"
        ) from error
    except Exception as error:  # a damaged pickle can raise any exception
        raise ConfigError(
            f"{file} is not a file that torch.save has written, or is damaged ({reason(error)}): "
            "copy or download it again"
        ) from error


_CHECKS = {".safetensors": _check_safetensors, ".gguf": gguf_file.check}
