"""Routed experts that the host's cores compute where they are stored, while others are copied to the device."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from zi_experiments.engines.stream import expert_share, host_product
from zi_experiments.engines.stream.host_int4 import Int4Linear
from zi_experiments.engines.stream.quantized import packed_views
from zi_experiments.engines.stream.slab import Layout, plain_experts

Product = Callable[[torch.Tensor], torch.Tensor]


class HostExperts:
    """The experts of one layer in host memory. For each choice of the router, it is told which of them it computes.

    Hidden states cross to the host, and outputs back, through pinned buffers. The host has waited for the device when a
    choice is known, so both are free then.
    """

    def __init__(self, module: Any, each: Layout, slabs: torch.Tensor, dtype: torch.dtype, share: float) -> None:
        """`slabs` has all experts, of shape (experts, bytes); `share` is that of the host in the work of missed experts."""
        self._module, self._share = module, share
        self.nbytes = each.nbytes  # of an expert
        up = "gate_up_proj" if module.has_gate else "up_proj"
        self._experts = [(one[up], one["down_proj"]) for one in _products(module, each, slabs, dtype)]
        self._taken: dict[int, list[int]] = {}  # pairs of the experts that it computes, by expert
        self._buffers = _Buffers(torch.empty(0, 0, dtype=dtype), 0)

    def take(self, missing: list[int], chosen: list[int]) -> list[int]:
        """Return which of the `missing` experts it computes; `chosen` are the experts of all pairs."""
        pairs: dict[int, list[int]] = {expert: [] for expert in missing}
        for pair, expert in enumerate(chosen):
            if expert in pairs:
                pairs[expert].append(pair)
        rows = [len(pairs[expert]) for expert in missing]
        self._taken = {missing[at]: pairs[missing[at]] for at in expert_share.chosen(rows, self._share)}
        return list(self._taken)

    def read(self, states: torch.Tensor, pairs: int) -> None:
        """Let the device copy hidden states (tokens, width) to the host; each token has equally many of the `pairs`."""
        if not self._buffers.fit(states, pairs):
            self._buffers = _Buffers(states, pairs)
        self._buffers.read(states)

    def compute(self) -> None:
        """Compute what was taken, from the states that were read."""
        states, outputs = self._buffers.states, self._buffers.outputs
        each = len(outputs) // len(states)
        outputs.zero_()
        for expert, pairs in self._taken.items():
            up, down = self._experts[expert]
            x = up(states[[pair // each for pair in pairs]])
            outputs[pairs] = down(self._module._apply_gate(x) if self._module.has_gate else self._module.act_fn(x))

    def add_to(self, outputs: torch.Tensor) -> None:
        """Add what was computed to `outputs` on the device, which has a row for each pair."""
        outputs += self._buffers.on_device(outputs.device)


class _Buffers:
    """Host memory for the states of so many tokens and the outputs of their pairs: pinned, if they are of a GPU."""

    def __init__(self, states: torch.Tensor, pairs: int) -> None:
        pinned = states.is_cuda
        self.states = torch.empty(states.shape, dtype=states.dtype, pin_memory=pinned)
        self.outputs = torch.empty(pairs, states.shape[-1], dtype=states.dtype, pin_memory=pinned)

    def fit(self, states: torch.Tensor, pairs: int) -> bool:
        return self.states.shape == states.shape and len(self.outputs) == pairs

    def read(self, states: torch.Tensor) -> None:
        self.states.copy_(states, non_blocking=True)

    def on_device(self, device: torch.device) -> torch.Tensor:
        if device.type == "cpu":
            return self.outputs
        from zi_experiments.engines.stream.pinned_kernel import read  # imports Triton, which a CPU does not need

        return read(self.outputs, device)


def _products(module: Any, each: Layout, slabs: torch.Tensor, dtype: torch.dtype) -> list[dict[str, Product]]:
    """Return the products with an expert's matrices, biases added, by the names of these in the module."""
    plain = {name.rpartition(".")[2]: stack for name, stack in plain_experts(slabs, each, dtype).items()}
    found: list[dict[str, Product]] = []
    for expert, slab in enumerate(slabs):
        biases = {name: stack[expert] for name, stack in plain.items() if name.endswith("_bias")}
        products: dict[str, Product] = {}
        for name in plain.keys() - biases.keys():
            products[name] = product(plain[name][expert], biases.get(f"{name}_bias"), transposed=module.is_transposed)
        for path, weight in packed_views(slab, each, dtype).items():
            name = path.rpartition(".")[2]
            products[name] = Int4Linear(weight, _parameter(biases.get(f"{name}_bias")))
        found.append(products)
    return found


def product(weight: torch.Tensor, bias: torch.Tensor | None, *, transposed: bool) -> Product:
    """Return the product with a 16-bit weight of shape (outputs, inputs), or the other way round if `transposed`."""
    if transposed or weight.shape[1] % host_product.STEP:
        return partial(functional.linear, weight=weight.T if transposed else weight, bias=bias)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer._parameters |= {"weight": _parameter(weight), "bias": _parameter(bias)}
    return host_product.HostLinear(layer)


def _parameter(value: torch.Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value, requires_grad=False)
