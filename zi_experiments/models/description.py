"""The architecture of a model, derived from its Hugging Face configuration; no weights are created or read.

The model is built on torch's meta device, so every family that transformers supports is described by its own code.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from zi_experiments.config.schema import ConfigError, Run
from zi_experiments.models import structure
from zi_experiments.models.architecture import Architecture
from zi_experiments.models.causal_lm import empty_model, model_class, quietly, refuse_encoder, text_part
from zi_experiments.models.configuration import read_config
from zi_experiments.quoting import printable


def load(run: Run) -> Architecture:
    """Return the architecture of a run's model. Raises `ConfigError` when it is not a causal language model."""
    return describe(read_config(run), run.model.name)


def describe(config: Any, name: str) -> Architecture:
    """Return the architecture of a transformers configuration; `name` is the model's name in error messages.

    Raises `ConfigError` when it is not a causal language model, or cannot be built from its numbers.
    """
    given, config = config, text_part(config)
    refuse_encoder(config, name)
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
    layers_name, layers = structure.decoder_layers(model)
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
        parameters=tuple(structure.parameters(model, layers_name)),
        kv_layers=structure.kv_layers(model, len(layers)),
        has_own_cache=not model._supports_default_dynamic_cache(),
    )


def _without_data(config: Any) -> Any:
    """Return a copy with implementations whose shapes do not depend on data, so that the model runs on the meta device."""
    config = deepcopy(config)
    config._attn_implementation = "eager"
    config._experts_implementation = "batched_mm"
    return config


def _max_positions(text: Any) -> int | None:
    """Return the number of positions of a model; None: no limit, which XLNet expresses as -1."""
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found >= 0 else None


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
