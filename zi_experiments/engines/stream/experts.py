"""Experts of a decoder layer: in a routed pass, only those that tokens are routed to are brought to the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zi_experiments.engines.stream.expert_pool import Group, Source
from zi_experiments.engines.stream.few_tokens import FewTokens
from zi_experiments.engines.stream.quantized import expand_experts, multiplies, multiply_packed
from zi_experiments.engines.stream.slab import Layout, expanded_experts, plain_experts


class RoutedExperts:
    """Replaces the `forward` of a module of experts while a pass is routed.

    For many tokens transformers' own function computes, on stacks of the experts that were routed in place of those of
    all. For a few, packed weights are multiplied without being expanded, where there is a kernel for them.
    """

    def __init__(self, module: Any, each: Layout, source: Source, expanded: torch.Tensor, few: FewTokens) -> None:
        """`expanded` is the buffer for quantized experts, in 16-bit elements."""
        self._module, self._each, self._source, self._expanded, self._few = module, each, source, expanded, few
        self._forward = module.forward
        self._multiplies = not getattr(module, "has_post_expert_norm", False) and multiplies(each, expanded)
        self._names = {name.rpartition(".")[2]: name for name in each.names}
        self.calls = self.used = 0  # calls so far; distinct experts, summed over them
        # set while a step is recorded: takes `compute` and its arguments, and returns the tensor of the result
        self.cut: Callable[..., torch.Tensor] | None = None

    @contextmanager
    def routed(self) -> Iterator[None]:
        """Compute with routed experts only in the context."""
        self._module.forward = self._run
        try:
            yield
        finally:
            self._module.forward = self._forward

    def _run(self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.cut is not None:
            return self.cut(self.compute, hidden_states, index, weights)
        return self.compute(hidden_states, index, weights)

    def compute(self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return what the module's own `forward` does; `index` and `weights` are of shape (tokens, experts of each)."""
        chosen = index.flatten().tolist()  # waits for the router
        needed = sorted({expert for expert in chosen if expert < self._module.num_experts})  # a larger one is none
        self.calls += 1
        self.used += len(needed)
        tokens, each = index.shape
        write = (
            self._packed if self._multiplies and len(chosen) <= self._few.packed_experts * len(needed) else self._expand
        )
        outputs = hidden_states.new_zeros(tokens * each, hidden_states.shape[-1])
        for group in self._source.bring(needed):
            place = {expert: number for number, expert in enumerate(group.experts)}
            pairs = [pair for pair, expert in enumerate(chosen) if expert in place]
            write(hidden_states, group, [(pair // each, place[chosen[pair]], pair) for pair in pairs], outputs)
        weighted = outputs.view(tokens, each, -1) * weights.unsqueeze(-1)
        return weighted.sum(1).to(hidden_states.dtype)

    def _packed(self, x: torch.Tensor, group: Group, pairs: list[tuple[int, int, int]], outputs: torch.Tensor) -> None:
        """Write the outputs of (token, number of the expert in the group, row of `outputs`), from packed weights."""
        lists = [(token, group.rows[number], pair, at) for at, (token, number, pair) in enumerate(pairs)]
        tokens, slabs, targets, order = _on_device(list(zip(*lists, strict=True)), x.device)
        up = self._multiply("gate_up_proj" if self._module.has_gate else "up_proj", x, group, (tokens, slabs, order))
        active = self._module._apply_gate(up) if self._module.has_gate else self._module.act_fn(up)
        self._multiply("down_proj", active, group, (order, slabs, targets), outputs)

    def _multiply(
        self,
        key: str,
        x: torch.Tensor,
        group: Group,
        pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        bias, transposed = self._names.get(f"{key}_bias"), self._module.is_transposed
        return multiply_packed(
            x, pairs, group.slabs, self._each, self._names[key], bias=bias, transposed=transposed, out=out
        )

    def _expand(self, x: torch.Tensor, group: Group, pairs: list[tuple[int, int, int]], outputs: torch.Tensor) -> None:
        """The same by the module's own function."""
        tokens, numbers, targets = _on_device(list(zip(*pairs, strict=True)), x.device)
        with self._pointing(self._stacks(group), len(group.experts)):
            output = self._forward(x[tokens], numbers.unsqueeze(1), x.new_ones(len(pairs), 1))
        outputs.index_copy_(0, targets, output)

    def _stacks(self, group: Group) -> dict[str, torch.Tensor]:
        """Return the group's parameters, by name in the layer."""
        rows = _on_device(group.rows, group.slabs.device)
        stacks = plain_experts(group.slabs, self._each, self._expanded.dtype)
        stacks = {name: stack.index_select(0, rows) for name, stack in stacks.items()}
        if self._each.quantized:
            expand_experts(group.slabs, self._each, self._expanded, rows)
            stacks |= expanded_experts(self._expanded, self._each, len(rows))
        return stacks

    @contextmanager
    def _pointing(self, stacks: dict[str, torch.Tensor], count: int) -> Iterator[None]:
        """Let the module have these `count` experts in the context."""
        module, own, all_experts = self._module, dict(self._module._parameters), self._module.num_experts
        for name, stack in stacks.items():
            module._parameters[name.rpartition(".")[2]] = nn.Parameter(stack, requires_grad=False)
        module.num_experts = count
        try:
            yield
        finally:
            module._parameters.update(own)
            module.num_experts = all_experts


def _on_device(numbers: Any, device: torch.device) -> torch.Tensor:
    """Return integers as a tensor on the device, copied without waiting."""
    made = torch.tensor(numbers, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)
