"""What the model should compute: plain transformers, whole or layer by layer, and the quantization format."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any, Protocol

from zi_experiments.config.schema import Quant
from zi_experiments.cost_model.plan import Plan
from zi_experiments.cost_model.spec import ELEMENT_BYTES
from zi_experiments.measurement.dequantized import dequantized
from zi_experiments.models import conversion, weights
from zi_experiments.models.architecture import Parameter
from zi_experiments.models.configuration import source_of
from zi_experiments.models.structure import decoder_layers, is_quantizable

Layer = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def round_trip(weight: Any, quant: Quant) -> Any:
    """Return a matrix (rows, columns), or a stack of them, quantized groupwise and expanded again, in its own dtype.

    Asymmetric: with `n` = 2^bits − 1 and the smallest and largest value of a group, scale = n / (largest − smallest),
    code = round((x − smallest) · scale), and the expanded value is code / scale + smallest. Written from this
    definition, which is that of DeepSpeed's ZeRO-Inference, and not from its code.
    """
    import torch

    if weight.dim() > 2:
        expanded = torch.empty_like(weight)
        for matrix, place in zip(weight, expanded, strict=True):
            place.copy_(round_trip(matrix, quant))
        return expanded
    assert quant.bits is not None
    assert quant.group_dim is not None
    groups = weight.unflatten(quant.group_dim, (-1, quant.group_size))
    within = quant.group_dim + 1
    low, high = groups.amin(within, keepdim=True), groups.amax(within, keepdim=True)
    largest = 2**quant.bits - 1
    scale = largest / (high - low)
    # when all values of a group are equal, the scale is infinite and the code zero
    codes = ((groups - low) * scale).nan_to_num(0.0).round().clamp(0, largest)
    return (codes / scale + low).flatten(quant.group_dim, within)


class Reference(Protocol):
    """The planned model in plain transformers."""

    kind: str  # how it is loaded
    layers_name: str

    def run(self, tokens: Any, layer: Layer) -> Any:
        """Return logits of shape (sequences, length, vocabulary) for `tokens` of shape (sequences, length).

        `layer(index, forward, args, kwargs)` is called in place of each decoder layer, and returns its output.
        `forward` is the layer's own, and its weights are loaded while it runs.
        """

    def generate(self, ids: Any, gen_len: int) -> Any | None:
        """Return `ids` and the greedy tokens of transformers' own `generate`; None: there is no whole model."""

    def close(self) -> None: ...


def of(plan: Plan, device: Any, host_memory_bytes: int) -> Reference:
    """Return the reference of a loaded plan: whole if a checkpoint fits in host memory, else layer by layer."""
    fits = ELEMENT_BYTES * plan.architecture.num_parameters < 0.9 * host_memory_bytes
    stored = plan.architecture.stored
    # ImportError: of a package that the checkpoint asks for, and the plan does not need; the others: transformers refuses
    # FP8 whose blocks do not divide a weight
    refused = (ImportError, RuntimeError, ValueError) if stored and stored.is_quantized else (ImportError,)
    if plan.run.weights.path is not None and fits and (stored is None or stored.is_expanded_by_transformers):
        with suppress(*refused):
            return Whole(plan, device)
    return LayerByLayer(plan, device)


class Whole:
    """A checkpoint that `AutoModelForCausalLM` loads itself: it shares neither loader nor configuration with engines.

    Its weights are in host memory; a GPU has those of one module at a time.
    """

    kind = "AutoModelForCausalLM"

    def __init__(self, plan: Plan, device: Any) -> None:
        from accelerate import cpu_offload

        gc.freeze()  # `close` need not look through what is there already: all that was imported
        self._model = _plain(plan)
        if plan.run.quant.is_quantized and not plan.run.quant.is_native:
            _quantize(self._model, plan.run.quant, device)
        if device.type != "cpu":
            cpu_offload(self._model, execution_device=device)
        self.layers_name, self._layers = decoder_layers(self._model)
        self._forwards = [layer.forward for layer in self._layers]

    def run(self, tokens: Any, layer: Layer) -> Any:
        return _logits(self._model, self._layers, self._forwards, tokens, layer)

    def generate(self, ids: Any, gen_len: int) -> Any | None:
        import torch
        from transformers import GenerationConfig

        for module, forward in zip(self._layers, self._forwards, strict=True):
            module.forward = forward
        # it replaces the model's own config, from which transformers would fill in unset fields
        self._model.generation_config = GenerationConfig(max_new_tokens=gen_len, do_sample=False, num_beams=1)
        return self._model.generate(ids, self._model.generation_config, attention_mask=torch.ones_like(ids))

    def close(self) -> None:
        vars(self).clear()
        gc.collect()  # modules and their replaced forwards refer to each other, and would keep all weights
        gc.unfreeze()


def _plain(plan: Plan) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoQuantizationConfig
    from transformers.utils.quantization_config import GgufConfig

    run, dtype = plan.run, getattr(torch, plan.dtype)
    assert run.weights.path is not None
    path, file = source_of(run.weights.path)
    how: dict[str, Any] = file | {"trust_remote_code": run.trust_remote_code}
    if commit := getattr(plan.architecture.config, "_commit_hash", None):
        how["revision"] = commit
    if file:
        how["quantization_config"] = GgufConfig(dequantize=True)
    elif plan.architecture.stored and plan.architecture.stored.is_quantized:
        how["quantization_config"] = AutoQuantizationConfig.from_pretrained(path, dequantize=True, **how)
    with conversion.without_zero3():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, return_dict=True, **how)
    kept = model._get_dtype_plan(dtype)
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            # beside FP8 weights that it dequantizes, transformers 5.23 leaves others in the type of the file
            parameter.data = parameter.data.to(dtype)
    return model


def _quantize(model: Any, quant: Quant, device: Any) -> None:
    """Quantize and expand a model's matrices in place, computed on `device`; a tied matrix is one parameter."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_quantizable(model, name):
                parameter.copy_(round_trip(parameter.to(device), quant))


def _logits(model: Any, layers: Any, forwards: list[Callable[..., Any]], tokens: Any, layer: Layer) -> Any:
    """Return a model's logits with `layer` called in place of each decoder layer; `forwards` are the layers' own."""
    import torch

    for index, (module, forward) in enumerate(zip(layers, forwards, strict=True)):
        module.forward = _called(layer, index, forward)
    with torch.inference_mode():
        return model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits


def _called(layer: Layer, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: layer(index, forward, args, kwargs)


class LayerByLayer:
    """A model of any size, or with random weights: decoder layers are on the meta device, except the one that runs."""

    kind = "layer by layer"

    def __init__(self, plan: Plan, device: Any) -> None:
        import torch

        self._plan, self._device = plan, device
        self._dtype = getattr(torch, plan.dtype)
        self._parameters = {p.name: p for p in plan.architecture.parameters}
        config = deepcopy(plan.architecture.config)
        self._weights = weights.of(plan.run.weights, config, self._dtype)
        self._model = weights.empty_model(self._weights, config, self._dtype, device)
        self.layers_name, self._layers = decoder_layers(self._model)
        self._forwards = [self._bound(index, layer.forward) for index, layer in enumerate(self._layers)]

    def generate(self, ids: Any, gen_len: int) -> Any | None:
        return None

    def close(self) -> None:
        self._weights.close()

    def run(self, tokens: Any, layer: Layer) -> Any:
        with self._present([name for name, p in self._parameters.items() if p.layer is None]):
            return _logits(self._model, self._layers, self._forwards, tokens, layer)

    def _bound(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        names = [name for name, p in self._parameters.items() if p.layer == index]

        def present(*args: Any, **kwargs: Any) -> Any:
            with self._present(names):
                return forward(*args, **kwargs)

        return present

    @contextmanager
    def _present(self, names: list[str]) -> Iterator[None]:
        """Give parameters their values within the context; a tied one is one parameter in several modules."""
        from torch import nn

        wanted = {id(self._model.get_parameter(name)): name for name in names}
        values: dict[int, Any] = {}
        places = []
        for module in self._model.modules():
            for key, parameter in module._parameters.items():
                if id(parameter) in wanted:
                    if id(parameter) not in values:
                        value = self._value(self._parameters[wanted[id(parameter)]])
                        values[id(parameter)] = nn.Parameter(value, requires_grad=False)
                    places.append((module, key, parameter))
        for module, key, parameter in places:
            module._parameters[key] = values[id(parameter)]
        try:
            yield
        finally:
            for module, key, parameter in places:
                module._parameters[key] = parameter

    def _value(self, parameter: Parameter) -> Any:
        import torch

        packing, is_native = self._plan.packing(parameter), self._plan.run.quant.is_native
        if is_native and packing is not None and isinstance(self._weights, weights.RandomWeights):
            packed = self._weights.packed(parameter.name, parameter.shape, packing, self._dtype, self._device)
            return dequantized(packed, packing.format, parameter.shape, self._dtype)
        tensor = torch.empty(parameter.shape, dtype=self._dtype, device=self._device)
        self._weights.fill(parameter.name, tensor)
        return tensor if packing is None or is_native else round_trip(tensor, self._plan.run.quant)
