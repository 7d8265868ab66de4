"""The Hugging Face configuration of a model: from the numbers in its YAML file, a folder, a GGUF file or the hub."""

import os
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from zi_experiments.config.schema import ConfigError, Model, Run, WeightSource
from zi_experiments.models import hub, remote_code
from zi_experiments.models.architecture import ANOTHER_MODEL
from zi_experiments.quoting import printable, reason


def read_config(run: Run) -> Any:
    """Return the transformers configuration of a run's model: from the numbers in its YAML file, or from `model.path`.

    With `weights=pretrained` and `weights.path`, the checkpoint's configuration is used. Raises `ConfigError`.
    """
    path = _path(run)
    if path is None:
        return _from_numbers(run.model)
    return _from_path(path, run.trust_remote_code, run.model.revision)


def check_path(run: Run) -> None:
    """Raise `ConfigError` if the run reads its model from a path that is not there or cannot be read."""
    path = _path(run)
    if path is not None and (problem := _problem(path)):
        raise ConfigError(f"{path} {problem}, and a model is a folder, a .gguf file or a hub name: {ANOTHER_MODEL}")


def _path(run: Run) -> str | None:
    """Return the path or hub name that a run's configuration is read from; None: it has its numbers in a YAML file."""
    path = run.weights.path if run.weights.source is WeightSource.pretrained else None
    return path or (run.model.path if run.model.architecture is None else None)


def _problem(path: str) -> str | None:
    """Return what is wrong with a path on this machine; None for what may be a name on the hub."""
    found = Path(path).expanduser()
    try:
        mode = found.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist" if path.startswith(("/", ".", "~")) else None  # a name on the hub
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not S_ISDIR(mode) and not is_gguf(path):
        return "is a file"
    needed = os.R_OK | os.X_OK if S_ISDIR(mode) else os.R_OK
    return None if os.access(found, needed, effective_ids=True) else "cannot be read (Permission denied)"


def _from_numbers(model: Model) -> Any:
    from transformers import CONFIG_MAPPING

    numbers = dict(model.architecture or {})
    model_type = numbers.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"model.architecture.model_type={model_type} is not a model that transformers knows: {ANOTHER_MODEL}"
        )
    config_class = CONFIG_MAPPING[model_type]
    try:
        return config_class(**numbers)
    except Exception as error:
        raise ConfigError(
            f"model={model.name}: {model_type} refuses these numbers ({error}): {ANOTHER_MODEL}"
        ) from error


def _from_path(path: str, trusted: bool, revision: str | None) -> Any:
    from transformers import AutoConfig, PreTrainedConfig

    source, how = source_of(path)
    if not how and Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ConfigError(f"{source} has no config.json, so it is not a Hugging Face model folder: {ANOTHER_MODEL}")
    if Path(source).is_dir() and revision is not None:
        raise ConfigError(
            f"model.revision={revision} is of the hub, and {path} is on this machine: pass model.revision=null"
        )
    if not Path(source).is_dir():
        hub.settle()
    if revision is not None:
        how["revision"] = revision
    try:
        # trust_remote_code=None would ask on the terminal
        found = AutoConfig.from_pretrained(source, trust_remote_code=trusted, **how)
    except Exception as error:
        if remote_code.is_refused_code(error, trusted):
            auto_map = PreTrainedConfig.get_config_dict(source, **how)[0]["auto_map"]
            raise ConfigError(remote_code.refused_code(path, auto_map)) from error
        if Path(source).is_dir():
            problem = printable(" ".join(str(error).split()) or type(error).__name__)
            file = Path(path).name if is_gguf(path) else "config.json"
            raise ConfigError(f"{path}: its {file} cannot be read ({problem}): {ANOTHER_MODEL}") from error
        raise ConfigError(
            f"{hub.named(path, revision)} is neither a Hugging Face model folder nor a hub name that can be read here "
            f"({reason(error)}): "
            "pass model.path=/path/to/a/folder, or the shape of a shipped model with random weights: model=opt-125m"
        ) from error
    if not Path(source).is_dir():
        found._commit_hash = hub.commit(path, revision)  # newer versions of transformers no longer set it
    return found


def local_or_hub(path: str) -> str:
    """Return the folder or GGUF file at `path`, with `~` resolved; if there is none, `path` as a name on the hub."""
    found = Path(path).expanduser()
    return str(found) if found.is_dir() or is_gguf(path) else path


def is_gguf(path: str) -> bool:
    """Return whether a path is of a GGUF file, that exists or not: no name on the hub ends so."""
    return path.endswith(".gguf")


def source_of(path: str) -> tuple[str, dict[str, str]]:
    """Return what transformers' `from_pretrained` takes for a path: a folder or hub name, and further arguments."""
    source = local_or_hub(path)
    if not is_gguf(path):
        return source, {}
    return str(Path(source).parent), {"gguf_file": Path(source).name}
