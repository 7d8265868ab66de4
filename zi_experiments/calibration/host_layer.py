"""How long a decoder layer of a run takes on the host's cores in a decode step, alone and while copies to the GPU run."""

import os
import time
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from zi_experiments.calibration import rates
from zi_experiments.calibration.host_experts import packed
from zi_experiments.engines.host_kv_cache import HostCache, HostLayer
from zi_experiments.engines.stream import host_int4, host_product
from zi_experiments.models import weights
from zi_experiments.models.structure import decoder_layers
from zi_experiments.runtime.pinned_memory import host_empty

LEAST_BYTES = 3 << 30  # of the layers that are computed in turn: much more than caches keep
STEPS = 24  # at most, in each of the two measurements
BUDGET_S = 1.5
ROOM = 8  # tokens beside those that attention reads


def measure(
    config: dict[str, Any],
    dtype: str,
    group_size: int | None,
    rows: int,
    tokens: int,
    threads: int,
    cores: list[int],
) -> dict[str, float | None]:
    """Return figures by their names in `Calibration`, for `rows` sequences that attend to so many `tokens`.

    `config` is the model's `config.json`; `group_size` that of INT4 weights, None in 16 bits.
    """
    if torch.cuda.is_available():
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    model = weights.empty_model(weights.RandomWeights(0), AutoConfig.for_model(**config), getattr(torch, dtype), "cpu")
    layers = _cut(model, 1 if group_size is None else 4)
    if group_size is not None:
        _quantize(layers, group_size)
    _fill(model)
    for layer in layers:
        host_product.use(layer)
    cache = HostCache(model.config, "cpu", rows, tokens + ROOM)
    with torch.inference_mode():
        alone_s, busy_s, link = _layer_s(model, layers, cache, rows, tokens), None, None
        if torch.cuda.is_available():
            with rates.copies() as copied:
                before, began = copied[0], time.perf_counter()
                busy_s = _layer_s(model, layers, cache, rows, tokens)
                link = (copied[0] - before) / (time.perf_counter() - began)
    return {"host_layer_s": alone_s, "host_layer_busy_s": busy_s, "link_busy_bytes_per_s": link}


def _cut(model: nn.Module, smaller: int) -> list[nn.Module]:
    """Leave the first layers of a model only, whose weights have `LEAST_BYTES` when they are so much smaller, or all."""
    prefix, _ = decoder_layers(model)
    layers: Any = model.get_submodule(prefix)
    each = sum(p.numel() * p.itemsize for p in layers[-1].parameters())
    del layers[max(2, -(-LEAST_BYTES * smaller // each)) :]
    return list(layers)


def _quantize(layers: list[nn.Module], group_size: int) -> None:
    """Give all linear layers INT4 weights, of equal values in equal shapes; each has memory of its own."""
    for layer in layers:
        weights = {
            f"{path}.weight": packed(module.out_features, module.in_features, module.weight.dtype, group_size)
            for path, module in layer.named_modules()
            if type(module) is nn.Linear
        }
        host_int4.use(layer, weights)


def _fill(model: nn.Module) -> None:
    """Give a model small random weights, the same few over and over; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    some = 0.02 * torch.randn(1 << 20)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                value = host_empty(parameter.numel(), parameter.dtype, pinned=False)  # in pages as slabs have
                for start in range(0, len(value), len(some)):
                    part = value[start : start + len(some)]
                    part.copy_(some[: len(part)])
                made[id(parameter)] = nn.Parameter(value.view(parameter.shape), requires_grad=False)
            module._parameters[name] = made[id(parameter)]


def _layer_s(model: Any, layers: list[nn.Module], cache: HostCache, rows: int, tokens: int) -> float:
    """Return the median over decode steps of the mean time of a layer."""
    spent: list[float] = []
    hooks = [layer.register_forward_pre_hook(lambda *_: spent.append(-time.perf_counter())) for layer in layers]
    hooks += [layer.register_forward_hook(lambda *_: spent.append(time.perf_counter())) for layer in layers]
    # other tokens are routed to other experts
    ids, steps = torch.arange(rows).view(rows, 1) % model.config.get_text_config().vocab_size, list[float]()
    until = time.perf_counter() + BUDGET_S
    try:
        while len(steps) < 3 or (len(steps) < STEPS and time.perf_counter() < until):
            for cached in cache.layers:
                if isinstance(cached, HostLayer):
                    cached.pretend(tokens)
            spent.clear()
            model(ids, past_key_values=cache, use_cache=True)
            steps.append(sum(spent) / len(layers))
    finally:
        for hook in hooks:
            hook.remove()
    return median(steps[1:])  # the first allocates
