"""Quantized parameters: stored packed by DeepSpeed, expanded for the forward pass of the module that owns them.

DeepSpeed quantizes `weight` of modules whose type is exactly `nn.Linear` or `nn.Embedding`, and expands it inside
`F.linear` and `F.embedding`. Experts in one 3-D tensor, subclasses of `nn.Linear` and GPT-2's `Conv1D` stay 16-bit.
Here a parameter is expanded where it is read, as an attribute of its module, whatever the module does with it.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from zi_experiments.config.schema import Quant


def quantize(parameter: Any, quant: Quant) -> None:
    """Pack a parameter in place, flat and in its own dtype: its integers, then a scale and a minimum per group."""
    from deepspeed.inference.quantization.utils import _quantize_param

    assert quant.group_dim is not None
    # for stacked experts, the dimension within each expert's matrix
    group_dim = quant.group_dim + parameter.dim() - 2
    config = {"num_bits": quant.bits, "group_size": quant.group_size, "group_dim": group_dim, "symmetric": False}
    _quantize_param(parameter, config)


def is_quantized(parameter: Any) -> bool:
    return getattr(parameter, "weight_quantized", False)


def expand_in_forward(model: Any) -> None:
    """Let each module with quantized parameters see them expanded while its `forward` runs."""
    for module in model.modules():
        if names := [name for name, parameter in module._parameters.items() if is_quantized(parameter)]:
            module.forward = _expanding(module, names, module.forward)


def _expanding(module: Any, names: list[str], forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch import nn

    expanded = _Rows if isinstance(module, nn.Embedding) else _expand

    @wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for name in names:
            # an instance's own attribute is found before a parameter of the same name
            module.__dict__[name] = expanded(module._parameters[name])
        try:
            return forward(*args, **kwargs)
        finally:
            for name in names:
                del module.__dict__[name]

    return wrapper


def _unpack(parameter: Any) -> tuple[Any, Any, Any]:
    """Return the integers as bytes, the scales and the minima of a gathered parameter."""
    import torch

    codes, scale, minimum = parameter.deconcat(parameter)
    return codes.view(torch.uint8), scale, minimum


def _expand(parameter: Any) -> Any:
    """Return the parameter's weights, in its dtype and shape before it was quantized."""
    codes, scale, minimum = _unpack(parameter)
    dequantizer = parameter.dequantizer
    if codes.device.type == "cuda":
        return dequantizer.dequantize(codes, scale, minimum)
    # for float16 DeepSpeed would look for its CUDA kernel, also on a CPU that computes float16
    if dequantizer.config["num_bits"] == 4:
        codes = dequantizer._decompress_uint4_to_uint8(codes)
    groups = codes.unflatten(dequantizer.config["group_dim"], (-1, dequantizer.config["group_size"]))
    return dequantizer._dequantize_int8(groups, scale, minimum).view(codes.shape)


class _Rows:
    """A quantized embedding table of shape (vocabulary, hidden). A lookup expands only the rows that it reads."""

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter
        self.dtype, self.device = parameter.dtype, parameter.device

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__ == "embedding":
            return args[1]._lookup(args[0])
        whole = [_expand(arg._parameter) if isinstance(arg, cls) else arg for arg in args]
        return function(*whole, **(kwargs or {}))

    def _lookup(self, ids: Any) -> Any:
        dequantizer = self._parameter.dequantizer
        bits, group_size, group_dim = (dequantizer.config[key] for key in ("num_bits", "group_size", "group_dim"))
        codes, scale, minimum = _unpack(self._parameter)
        rows = ids.flatten()
        codes = codes[rows]
        if bits == 4:
            codes = dequantizer._decompress_uint4_to_uint8(codes)
        values = codes.to(dequantizer.dtype)
        if group_dim == 0:
            group = rows // group_size
            values.div_(scale[group, 0]).add_(minimum[group, 0])
        else:
            values.unflatten(1, (-1, group_size)).div_(scale[rows]).add_(minimum[rows])
        return values.unflatten(0, ids.shape)
