"""Facts about a model, read off its Hugging Face configuration; no weights are made or read.

The model is built on torch's meta device, so every family that transformers knows is described by its own code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

from zi_experiments.config import ConfigError, Model, Run, WeightSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter tensor of the model; tied ones appear once."""

    name: str
    shape: tuple[int, ...]
    quantizable: bool  # DeepSpeed quantizes the weights of plain nn.Linear and nn.Embedding modules
    layer: int | None  # index of the decoder layer it belongs to; None outside of them

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What a plan needs to know of a model."""

    config: Any = field(repr=False)  # the transformers configuration
    model_type: str
    dtype: str | None  # the type the configuration names
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_positions: int | None
    layer_class: str  # dotted path of the decoder layer's class
    parameters: tuple[Parameter, ...] = field(repr=False)
    tied: tuple[Parameter, ...] = field(repr=False)  # made like the others, then replaced by the one they are tied to

    @property
    def num_parameters(self) -> int:
        """All parameters, tied ones counted once."""
        return sum(parameter.numel for parameter in self.parameters)

    def kv_elements_per_token(self) -> int:
        """Keys and values that one token of one sequence adds, over all layers: 2 · L · h_kv · d."""
        return 2 * self.num_layers * self.num_key_value_heads * self.head_dim


def load(run: Run) -> Architecture:
    """The architecture behind `model=…`. Raises `ConfigError` when it is not a causal language model."""
    return describe(read_config(run), run.model.name)


def read_config(run: Run) -> Any:
    """The transformers configuration of a run's model: the numbers in its YAML, or those of `model.path`.

    With `weights=pretrained` and a path of its own, the checkpoint's configuration counts.
    """
    source = run.weights.path if run.weights.source is WeightSource.pretrained else None
    if source is not None or run.model.architecture is None:
        return _from_path(source or run.model.path or "")
    return _from_numbers(run.model)


def _from_numbers(model: Model) -> Any:
    from transformers import CONFIG_MAPPING

    numbers = dict(model.architecture or {})
    model_type = numbers.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"model.architecture.model_type={model_type} is not a model that transformers knows")
    config_class = CONFIG_MAPPING[model_type]
    try:
        return config_class(**numbers)
    except Exception as error:
        raise ConfigError(f"model={model.name}: {model_type} refuses these numbers: {error}") from error


def _from_path(path: str) -> Any:
    from pathlib import Path

    from transformers import AutoConfig

    folder = Path(path).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json, so it is not a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(str(folder) if folder.is_dir() else path)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{path} is neither a Hugging Face model folder nor a hub name that can be read here ({reason}): "
            "pass model.path=/path/to/a/folder, or the shape of a shipped model with random weights: model=opt-125m"
        ) from error


def model_class(config: Any) -> Any:
    """The causal-LM class of a configuration, as transformers maps it. Raises `ConfigError` when it has none."""
    from transformers import AutoModelForCausalLM

    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise ConfigError(
            f"model type {config.model_type} is not a causal language model: "
            "pass model=opt-125m, or model=local model.path=… of one (for example opt, bloom, llama, mixtral)"
        )
    return mapping[type(config)]


def describe(config: Any, name: str) -> Architecture:
    """The architecture of a transformers configuration; `name` is what errors call it.

    Raises `ConfigError` when it is not a causal language model, or when its numbers do not make one.
    """
    import torch
    from torch import nn

    config_class = model_class(config)
    try:
        with torch.device("meta"), _quietly():
            model = config_class(config)
            model.tie_weights()
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model={name}: {config.model_type} cannot be built from these numbers: {reason}") from error
    text = config.get_text_config()
    layers_name, layers = decoder_layers(model)
    quantizable = {
        f"{name}.weight" for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Embedding)
    }
    everything = {
        name: Parameter(
            name=name,
            shape=tuple(parameter.shape),
            quantizable=name in quantizable,
            layer=int(name.removeprefix(f"{layers_name}.").split(".")[0])
            if name.startswith(f"{layers_name}.")
            else None,
        )
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    unique = {name for name, _ in model.named_parameters()}
    layer = type(layers[0])
    heads = text.num_attention_heads
    return Architecture(
        config=config,
        model_type=config.model_type,
        dtype=str(config.dtype).removeprefix("torch.") if config.dtype is not None else None,
        hidden_size=text.hidden_size,
        num_layers=len(layers),
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        max_positions=getattr(text, "max_position_embeddings", None),
        layer_class=f"{layer.__module__}.{layer.__qualname__}",
        parameters=tuple(parameter for name, parameter in everything.items() if name in unique),
        tied=tuple(parameter for name, parameter in everything.items() if name not in unique),
    )


def decoder_layers(model: Any) -> tuple[str, Any]:
    """Name and `nn.ModuleList` of a model's decoder layers: the list of one class that holds the most parameters."""
    from torch import nn

    def weight(modules: Any) -> int:
        return sum(parameter.numel() for parameter in modules.parameters())

    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(child) for child in module}) == 1
    ]
    if not lists:
        raise ConfigError(
            f"{type(model).__name__} has no list of decoder layers: it cannot be offloaded layer by layer"
        )
    return max(lists, key=lambda item: weight(item[1]))


@contextmanager
def _quietly() -> Iterator[None]:
    from transformers.initialization import no_init_weights
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_init_weights():
            yield
    finally:
        logging.set_verbosity(level)
