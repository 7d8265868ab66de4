"""The architecture of a model, derived from its Hugging Face configuration; no weights are created or read.

The model is built on torch's meta device, so every family that transformers supports is described by its own code.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from zi_experiments.config.schema import ConfigError, Model, Run, WeightSource
from zi_experiments.models import hub, native
from zi_experiments.models.packing import Packing

_LONGEST_QUOTE = 300  # characters
_ANOTHER = "pass model=opt-125m, or model=local model.path=… of another"


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter tensor of the model; tied parameters appear once."""

    name: str
    shape: tuple[int, ...]
    quantizable: bool
    layer: int | None  # index of its decoder layer; None outside of the layers
    # name of its module, if that computes each token with the experts that a router selects for it, one of which is
    # `tensor[i]`, through transformers' interface for experts; None for other parameters
    experts: str | None = None
    native: Packing | None = None  # how checkpoints store it, if they store it quantized
    is_linear: bool = False  # the weight of a linear layer, as torch has it

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_experts(self) -> bool:
        """True if it is a stack of expert matrices, of which a router selects some for each token."""
        return self.quantizable and len(self.shape) == 3


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayer:
    """Size of one attention layer's KV cache."""

    elements_per_token: int  # of keys and values together
    max_tokens: int | None  # of a sliding window; None: all tokens are kept

    def elements(self, tokens: int) -> int:
        """Return the cached elements of one sequence of so many tokens."""
        return self.elements_per_token * (tokens if self.max_tokens is None else min(tokens, self.max_tokens))


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredAs:
    """How the weights are stored in a checkpoint."""

    format: str  # the quantization method, or the type of most weights
    bits_per_parameter: float | None  # scales included; None: its files are not here yet
    is_quantized: bool
    is_expanded_by_transformers: bool  # False: quantized, and plain transformers cannot expand it


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Everything that a plan needs to know about a model."""

    config: Any = field(repr=False)  # the transformers configuration
    model_type: str
    dtype: str | None  # the type in the configuration
    hidden_size: int
    num_layers: int
    max_positions: int | None  # None: no limit
    layer_classes: tuple[str, ...]  # dotted paths of the decoder layers' classes: hybrids have several
    is_text_part: bool  # of a multimodal checkpoint, whose other towers are dropped
    notes: tuple[str, ...]  # deviations from the configuration
    parameters: tuple[Parameter, ...] = field(repr=False)
    kv_layers: tuple[KVLayer, ...] = field(repr=False)
    has_own_cache: bool  # its own class for the KV cache or for states; it accepts no other cache
    # tensors in the checkpoint that the model leaves out on purpose
    ignored_tensors: tuple[str, ...] = field(default=(), repr=False)
    stored: StoredAs | None = None  # in the checkpoint; None: random weights, or nothing is known before it is loaded

    @property
    def is_routed(self) -> bool:
        """True if the model has experts: each token uses only those that a router selects."""
        return any(parameter.is_experts for parameter in self.parameters)

    @property
    def num_parameters(self) -> int:
        """All parameters, tied ones counted once."""
        return sum(parameter.numel for parameter in self.parameters)

    def kv_elements(self, tokens: int) -> int:
        """Return the KV cache elements of one sequence of so many tokens, over all layers."""
        return sum(layer.elements(tokens) for layer in self.kv_layers)


def load(run: Run) -> Architecture:
    """Return the architecture of a run's model. Raises `ConfigError` when it is not a causal language model."""
    return describe(read_config(run), run.model.name)


def read_config(run: Run) -> Any:
    """Return the transformers configuration of a run's model: from the numbers in its YAML file, or from `model.path`.

    With `weights=pretrained` and `weights.path`, the checkpoint's configuration is used. Raises `ConfigError`.
    """
    source = run.weights.path if run.weights.source is WeightSource.pretrained else None
    if source is not None or run.model.architecture is None:
        return _from_path(source or run.model.path or "", run.trust_remote_code, run.model.revision)
    return _from_numbers(run.model)


def _from_numbers(model: Model) -> Any:
    from transformers import CONFIG_MAPPING

    numbers = dict(model.architecture or {})
    model_type = numbers.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"model.architecture.model_type={model_type} is not a model that transformers knows: {_ANOTHER}"
        )
    config_class = CONFIG_MAPPING[model_type]
    try:
        return config_class(**numbers)
    except Exception as error:
        raise ConfigError(f"model={model.name}: {model_type} refuses these numbers ({error}): {_ANOTHER}") from error


def _from_path(path: str, trusted: bool, revision: str | None) -> Any:
    from transformers import AutoConfig, PreTrainedConfig

    source, how = source_of(path)
    if not how and Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ConfigError(f"{source} has no config.json, so it is not a Hugging Face model folder: {_ANOTHER}")
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
        if is_refused_code(error, trusted):
            auto_map = PreTrainedConfig.get_config_dict(source, **how)[0]["auto_map"]
            raise ConfigError(refused_code(path, auto_map)) from error
        if Path(source).is_dir():
            problem = printable(" ".join(str(error).split()) or type(error).__name__)
            file = Path(path).name if is_gguf(path) else "config.json"
            raise ConfigError(f"{path}: its {file} cannot be read ({problem}): {_ANOTHER}") from error
        raise ConfigError(
            f"{hub.named(path, revision)} is neither a Hugging Face model folder nor a hub name that can be read here "
            f"({reason(error)}): "
            "pass model.path=/path/to/a/folder, or the shape of a shipped model with random weights: model=opt-125m"
        ) from error
    if not Path(source).is_dir():
        found._commit_hash = hub.commit(path, revision)  # newer versions of transformers no longer set it
    return found


def is_refused_code(error: Exception, trusted: bool) -> bool:
    """Return whether the error says that a checkpoint needs its own Python files, which transformers has not run."""
    return not trusted and isinstance(error, ValueError) and "trust_remote_code" in str(error)


def refused_code(path: str, auto_map: Any) -> str:
    """Return the message for such a checkpoint; its `auto_map` has a class, or a list of classes, for each purpose."""
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    references = [one for value in values for one in (value if isinstance(value, list) else [value]) if one]
    files = ", ".join(sorted({_python_file(str(one)) for one in references}))
    return (
        f"{path} wants to run {printable(files)}, and nothing of that was run: "
        f"pass trust_remote_code=true if you trust {path}"
    )


def _python_file(reference: str) -> str:
    """Return the file of `module.Class`, or of `owner/repository--module.Class`, which is on the hub."""
    repository, _, name = reference.rpartition("--")
    return f"{repository}/{name.partition('.')[0]}.py".lstrip("/")


def reason(error: BaseException) -> str:
    """Return the first line of an error message, made printable: it may quote a checkpoint."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


def printable(text: str) -> str:
    """Return text from an untrusted source without line breaks or terminal control characters, and truncated."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}…"


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


def model_class(config: Any) -> Any:
    """Return the causal-LM class of a configuration: transformers' own, or the checkpoint's if its code made `config`.

    Code is loaded only in the second case: such a `config` exists only if the checkpoint is trusted. Raises `ConfigError`
    when there is no causal-LM class.
    """
    from transformers import AutoModelForCausalLM

    name = AutoModelForCausalLM.__name__
    if _is_remote(config) and name in (getattr(config, "auto_map", None) or {}):
        return _remote_class(config, config.auto_map[name])
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise ConfigError(
            f"model type {config.model_type} is not a causal language model: "
            "pass model=opt-125m, or model=local model.path=… of one (for example opt, bloom, llama, mixtral)"
        )
    return mapping[type(config)]


def _is_remote(config: Any) -> bool:
    from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

    return type(config).__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")


def _remote_class(config: Any, reference: str) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        return _generating(get_class_from_dynamic_module(reference, config.name_or_path))
    except Exception as error:
        file = printable(_python_file(reference))
        raise ConfigError(
            f"{config.name_or_path}: its {file} cannot be loaded ({reason(error)}): {_ANOTHER}"
        ) from error


@cache  # one class for all callers: transformers derives a new one at each call
def _generating(remote: Any) -> Any:
    """Return a checkpoint's model class, prepared for generation as `AutoModelForCausalLM` does it."""
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    remote.register_for_auto_class("AutoModelForCausalLM")
    return add_generation_mixin_to_remote_model(remote)


def describe(config: Any, name: str) -> Architecture:
    """Return the architecture of a transformers configuration; `name` is the model's name in error messages.

    Raises `ConfigError` when it is not a causal language model, or cannot be built from its numbers.
    """
    given, config = config, text_part(config)
    _refuse_encoder(config, name)
    model = empty_model(_without_data(config), name)
    attention = _unavailable_attention(config)
    if attention is not None:
        config = deepcopy(config)
        config._attn_implementation = None  # transformers takes the best available
    if not config.return_dict:
        config = deepcopy(config)
        config.return_dict = True  # the logits are read from the output by name
    text = config.get_text_config(decoder=True)
    if not hasattr(text, "hidden_size"):
        raise ConfigError(f"model={name}: {config.model_type} has no single width (hidden_size): pass model=opt-125m")
    layers_name, layers = decoder_layers(model)
    return Architecture(
        config=config,
        model_type=given.model_type,
        dtype=str(config.dtype).removeprefix("torch.") if config.dtype is not None else None,
        hidden_size=text.hidden_size,
        num_layers=len(layers),
        max_positions=_max_positions(text),
        layer_classes=tuple(dict.fromkeys(f"{type(one).__module__}.{type(one).__qualname__}" for one in layers)),
        is_text_part=config.model_type != given.model_type,
        notes=tuple(_notes(given, config, attention)),
        parameters=tuple(_parameters(model, layers_name)),
        kv_layers=_kv_layers(model, len(layers)),
        has_own_cache=not model._supports_default_dynamic_cache(),
    )


def _max_positions(text: Any) -> int | None:
    """Return the number of positions of a model; None: no limit, which XLNet expresses as -1."""
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found >= 0 else None


def text_part(config: Any) -> Any:
    """Return the configuration for the causal-LM class: the text part of some multimodal models, or else `config` itself.

    `AutoModelForCausalLM` chooses in the same way; the text class leaves out the checkpoint's other modalities.
    """
    if getattr(model_class(config), "config_class", None) is not config.sub_configs.get("text_config"):
        return config
    text = deepcopy(config.get_text_config())
    for inherited in ("dtype", "quantization_config", "_commit_hash"):
        if (value := getattr(config, inherited, None)) is not None:
            setattr(text, inherited, value)
    return text


def empty_model(config: Any, name: str) -> Any:
    """Return the model of a configuration on the meta device; `name` is the model's name in error messages."""
    import torch

    config_class = model_class(config)
    try:
        with torch.device("meta"), quietly():
            model = config_class(config)
            model.tie_weights()
    except Exception as error:
        problem = f"{config.model_type} cannot be built from these numbers ({reason(error)})"
        raise ConfigError(f"model={name}: {problem}: {_ANOTHER}") from error
    return model


def _refuse_encoder(config: Any, name: str) -> None:
    """Raise `ConfigError` for a model whose attention is not causal, even if its family can be configured to decode."""
    from transformers import AutoModelForMaskedLM

    kind = None
    if config.is_encoder_decoder:
        kind = "an encoder with a decoder"
    elif type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False):
        kind = "an encoder (is_decoder is not true)"
    if kind is not None:
        raise ConfigError(
            f"model={name}: {config.model_type} is {kind} and no causal language model: "
            "pass model=opt-125m, or model=local model.path=… of one (for example opt, bloom, llama, mixtral)"
        )


def _unavailable_attention(config: Any) -> str | None:
    """Return the attention implementation that the configuration requests, if it is not available here, or None."""
    import torch

    wanted = config._attn_implementation
    if wanted is None:
        return None
    try:
        with torch.device("meta"), quietly():
            model_class(config)(deepcopy(config))
    except (ImportError, ValueError):
        return printable(str(wanted))
    return None


def _notes(given: Any, config: Any, attention: str | None) -> Iterator[str]:
    if config.model_type != given.model_type:
        yield f"only the text part of {given.model_type} is loaded: its parts for images or sound are dropped"
    if attention is not None:
        yield f"{attention}, which the configuration asks for, is not available here: transformers' default attention is used"


def _parameters(model: Any, layers_name: str) -> Iterator[Parameter]:
    """Yield each parameter under the first of its names. One that several layers share belongs to no layer."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    experts = _experts(model, layers_name)
    packings = native.packings(model, experts)
    for name, parameter in model.named_parameters():
        layers = {_layer_index(one, layers_name) for one in names[id(parameter)]}
        layer = layers.pop() if len(layers) == 1 else None
        yield Parameter(
            name=name,
            shape=tuple(parameter.shape),
            quantizable=is_quantizable(model, name),
            is_linear=_is_linear(model, name),
            layer=layer,
            experts=experts.get(name) if layer is not None and len(names[id(parameter)]) == 1 else None,
            native=packings.get(name),
        )


def _experts(model: Any, layers_name: str) -> dict[str, str]:
    """Return the parameters that modules of experts have for each expert, and the module of each, by their names.

    Only of modules that use transformers' interface for experts, and are the only one in their decoder layer.
    """
    modules = [(name, module) for name, module in model.named_modules() if is_experts_module(module)]
    times = Counter(_layer_index(name, layers_name) for name, _ in modules)
    return {
        f"{name}.{key}": name
        for name, module in modules
        if times[_layer_index(name, layers_name)] == 1
        for key, parameter in module.named_parameters()
        if parameter.dim() > 1 and parameter.shape[0] == module.num_experts
    }


def is_experts_module(module: Any) -> bool:
    """Return whether a module uses the interface of `transformers.integrations.moe`, which sets these attributes."""
    return all(hasattr(module, name) for name in ("num_experts", "is_transposed", "has_bias", "_apply_gate"))


def _layer_index(name: str, layers_name: str) -> int | None:
    within = name.removeprefix(f"{layers_name}.")
    return None if within == name else int(within.partition(".")[0])


def _without_data(config: Any) -> Any:
    """Return a copy with implementations whose shapes do not depend on data, so that the model runs on the meta device."""
    config = deepcopy(config)
    config._attn_implementation = "eager"
    config._experts_implementation = "batched_mm"
    return config


def _kv_layers(model: Any, num_layers: int) -> tuple[KVLayer, ...]:
    """Return the KV cache size of each layer, measured by a pass of one token through a model on the meta device.

    The configuration does not tell: with latent attention some families cache the latents and others whole heads, which
    also differs between versions of transformers. States that do not grow with a sequence are not counted.
    """
    import torch
    from transformers import DynamicCache

    try:
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), torch.device("meta"), quietly():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    except Exception:  # estimate for the few families whose expert routing needs data: JetMoE, LongCat
        text = model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
        if heads is None:
            return ()  # xLSTM has no attention: nothing grows with a sequence
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return (KVLayer(elements_per_token=2 * heads * head_dim, max_tokens=None),) * num_layers
    growing = ("keys", "values", "indexer_keys")  # the last with sparse attention
    return tuple(
        KVLayer(
            elements_per_token=sum(
                tensor.numel() for name in growing if (tensor := getattr(layer, name, None)) is not None
            ),
            max_tokens=layer.sliding_window - 1 if getattr(layer, "is_sliding", False) else None,
        )
        for layer in cache.layers
    )


def _is_linear(model: Any, name: str) -> bool:
    from torch import nn

    return name.endswith(".weight") and type(model.get_submodule(name.removesuffix(".weight"))) is nn.Linear


def is_quantizable(model: Any, name: str) -> bool:
    """Return whether a parameter is a matrix that can be quantized.

    These are the weights of linear layers and embeddings (subclasses included) and of GPT-2's `Conv1D`, and experts stacked
    in one 3-D tensor. Not quantized are norms, biases and convolutions; OPT's position table, which every token reads and
    whose number of rows no group size divides; and the small step projections (`dt_proj`) of state space models, which
    the surrounding module multiplies itself.
    """
    from torch import nn
    from torch.nn.modules.conv import _ConvNd
    from transformers.pytorch_utils import Conv1D

    owner, _, attribute = name.rpartition(".")
    module, shape = model.get_submodule(owner), model.get_parameter(name).shape
    if len(shape) == 3:
        return shape[-2] > 1 and not isinstance(module, _ConvNd)
    if "Positional" in type(module).__name__ or owner.endswith(".dt_proj"):
        return False
    return len(shape) == 2 and attribute == "weight" and isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def decoder_layers(model: Any) -> tuple[str, Any]:
    """Return the name and the `nn.ModuleList` of a model's decoder layers. Raises `ConfigError` when there are none.

    Only lists in the decoder count, which excludes a vision tower. Preferred are lists as long as the text configuration's
    number of layers, then the list with the most parameters: a layer may contain lists too.
    """
    from torch import nn

    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise ConfigError(
            f"{type(model).__name__} has no decoder layers, so it cannot be offloaded layer by layer: {_ANOTHER}"
        )
    decoder = {id(module) for module in model.get_decoder().modules()}
    within = [item for item in lists if id(item[1]) in decoder] or lists

    def rank(item: tuple[str, Any]) -> tuple[bool, int]:
        return len(item[1]) == count, sum(parameter.numel() for parameter in item[1].parameters())

    return max(within, key=rank)


@contextmanager
def quietly() -> Iterator[None]:
    """Let transformers build or load a model without initialising weights, and without log messages or bars."""
    from transformers.initialization import no_init_weights
    from transformers.utils import logging

    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with no_init_weights():
            yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()
