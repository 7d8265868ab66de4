"""Layers, parameters, experts and KV cache of a model on the meta device, as its own code has them."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from zi_experiments.config.schema import ConfigError
from zi_experiments.models import native
from zi_experiments.models.architecture import ANOTHER_MODEL, KVLayer, Parameter
from zi_experiments.models.causal_lm import quietly


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
            f"{type(model).__name__} has no decoder layers, so it cannot be offloaded layer by layer: {ANOTHER_MODEL}"
        )
    decoder = {id(module) for module in model.get_decoder().modules()}
    within = [item for item in lists if id(item[1]) in decoder] or lists

    def rank(item: tuple[str, Any]) -> tuple[bool, int]:
        return len(item[1]) == count, sum(parameter.numel() for parameter in item[1].parameters())

    return max(within, key=rank)


def parameters(model: Any, layers_name: str) -> Iterator[Parameter]:
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
            is_linear=_is_linear(model, name, experts.get(name)),
            layer=layer,
            experts=experts.get(name) if layer is not None and len(names[id(parameter)]) == 1 else None,
            native=packings.get(name),
        )


def _layer_index(name: str, layers_name: str) -> int | None:
    within = name.removeprefix(f"{layers_name}.")
    return None if within == name else int(within.partition(".")[0])


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


def _is_linear(model: Any, name: str, experts: str | None) -> bool:
    from torch import nn

    if experts is not None:
        return is_quantizable(model, name) and not model.get_submodule(experts).is_transposed
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


def kv_layers(model: Any, num_layers: int) -> tuple[KVLayer, ...]:
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
