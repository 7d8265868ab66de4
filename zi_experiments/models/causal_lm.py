"""The causal language model of a configuration: its class, and the model itself without weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from zi_experiments.config.schema import ConfigError
from zi_experiments.models import remote_code
from zi_experiments.models.architecture import ANOTHER_MODEL
from zi_experiments.quoting import reason


def model_class(config: Any) -> Any:
    """Return the causal-LM class of a configuration: transformers' own, or the checkpoint's if its code made `config`.

    Code is loaded only in the second case: such a `config` exists only if the checkpoint is trusted. Raises `ConfigError`
    when there is no causal-LM class.
    """
    from transformers import AutoModelForCausalLM

    name = AutoModelForCausalLM.__name__
    if remote_code.is_remote(config) and name in (getattr(config, "auto_map", None) or {}):
        return remote_code.load_class(config, config.auto_map[name])
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise ConfigError(
            f"model type {config.model_type} is not a causal language model: "
            "pass model=opt-125m, or model=local model.path=… of one (for example opt, bloom, llama, mixtral)"
        )
    return mapping[type(config)]


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


def refuse_encoder(config: Any, name: str) -> None:
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
        raise ConfigError(f"model={name}: {problem}: {ANOTHER_MODEL}") from error
    return model


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
