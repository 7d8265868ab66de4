"""What the model should compute: plain transformers, one decoder layer in memory at a time, and the quantization format."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from zi_experiments import weights
from zi_experiments.architecture import Parameter, decoder_layers
from zi_experiments.config import Quant
from zi_experiments.plan import Plan


def round_trip(weight: Any, quant: Quant) -> Any:
    """A matrix (rows, columns), or a stack of them, quantized groupwise and expanded again, in its own dtype.

    Asymmetric: with `n` = 2^bits − 1 and the smallest and largest value of a group, scale = n / (largest − smallest),
    code = round((x − smallest) · scale), and what is computed with is code / scale + smallest. Written from this
    definition, which is that of DeepSpeed's ZeRO-Inference, and from none of its code.
    """
    import torch

    if weight.dim() > 2:
        expanded = torch.empty_like(weight)
        for matrix, place in zip(weight, expanded, strict=True):
            place.copy_(round_trip(matrix, quant))
        return expanded
    assert quant.group_dim is not None
    groups = weight.unflatten(quant.group_dim, (-1, quant.group_size))
    within = quant.group_dim + 1
    low, high = groups.amin(within, keepdim=True), groups.amax(within, keepdim=True)
    largest = 2**quant.bits - 1
    scale = largest / (high - low)
    # where all values of a group are equal the scale is infinite, and the code zero
    codes = ((groups - low) * scale).nan_to_num(0.0).round().clamp(0, largest)
    return (codes / scale + low).flatten(quant.group_dim, within)


class Reference:
    """The planned model in plain transformers, on one device, its decoder layers on the meta device until they run."""

    def __init__(self, plan: Plan, device: Any) -> None:
        import torch

        self._plan, self._device = plan, device
        self._dtype = getattr(torch, plan.dtype)
        self._parameters = {p.name: p for p in plan.architecture.parameters}
        config = deepcopy(plan.architecture.config)
        self._weights = weights.of(plan.run.weights, config, self._dtype)
        self.model = weights.empty_model(self._weights, config, self._dtype, device)
        self.layers_name, self.layers = decoder_layers(self.model)

    def close(self) -> None:
        self._weights.close()

    def run(self, tokens: Any, layer: Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> Any:
        """Logits of shape (sequences, length, vocabulary) for `tokens` of shape (sequences, length).

        `layer(index, forward, args, kwargs)` stands for each decoder layer and returns what it does; `forward` is the
        layer's own, and its weights are there while it runs.
        """
        import torch

        outside = [name for name, p in self._parameters.items() if p.layer is None]
        for index, module in enumerate(self.layers):
            module.forward = self._bound(index, type(module).forward.__get__(module), layer)
        with torch.inference_mode(), self._present(outside):
            return self.model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits

    def _bound(self, index: int, forward: Callable[..., Any], layer: Callable[..., Any]) -> Callable[..., Any]:
        names = [name for name, p in self._parameters.items() if p.layer == index]

        def present(*args: Any, **kwargs: Any) -> Any:
            with self._present(names):
                return forward(*args, **kwargs)

        return lambda *args, **kwargs: layer(index, present, args, kwargs)

    @contextmanager
    def _present(self, names: list[str]) -> Iterator[None]:
        """Give parameters their values while it is entered; tied ones are one parameter in several modules."""
        from torch import nn

        wanted = {id(self.model.get_parameter(name)): name for name in names}
        values: dict[int, Any] = {}
        places = []
        for module in self.model.modules():
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

        tensor = torch.empty(parameter.shape, dtype=self._dtype, device=self._device)
        self._weights.fill(parameter.name, tensor)
        return round_trip(tensor, self._plan.run.quant) if self._plan.is_quantized(parameter) else tensor
