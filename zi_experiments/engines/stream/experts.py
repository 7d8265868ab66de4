"""Experts of a decoder layer: in a routed pass, only those that tokens are routed to are brought to the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from zi_experiments.cost_model.spec import drawn_evenly
from zi_experiments.engines.stream.expert_pool import Group, Source
from zi_experiments.engines.stream.few_tokens import FewTokens
from zi_experiments.engines.stream.fixed_pairs import Counts, FixedPairs
from zi_experiments.engines.stream.host_experts import HostExperts
from zi_experiments.engines.stream.quantized import expand_experts, multiplies, multiply_packed
from zi_experiments.engines.stream.routing import together
from zi_experiments.engines.stream.slab import Layout, expanded_experts, plain_experts


class RoutedExperts:
    """Replaces the `forward` of a module of experts while a pass is routed.

    For many tokens transformers' own function computes, on stacks of the experts that were routed in place of those of
    all. For a few, packed weights are multiplied without being expanded, where there is a kernel for them.
    """

    def __init__(
        self,
        module: Any,
        each: Layout,
        source: Source,
        expanded: torch.Tensor,
        few: FewTokens,
        counts: Counts,
        host: HostExperts | None = None,
    ) -> None:
        """`expanded` is the buffer for quantized experts, in 16-bit elements; `host` computes some of those missing."""
        self._module, self._each, self._source, self._expanded, self._few = module, each, source, expanded, few
        self._host = host
        self._forward = module.forward
        self._multiplies = not getattr(module, "has_post_expert_norm", False) and multiplies(each, expanded)
        self._names = {name.rpartition(".")[2]: name for name in each.names}
        self._counts = counts
        self._fixed: FixedPairs | None = None
        self.cut: Callable[[Callable[[], object]], None] | None = None

    @contextmanager
    def routed(self) -> Iterator[None]:
        """Compute with routed experts only in the context."""
        self._module.forward = self._run
        try:
            yield
        finally:
            self._module.forward = self._forward

    def _run(self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        packed = self._multiplies and self._is_packed(index)
        if packed and min(index.numel(), self._module.num_experts) <= self._source.at_once:
            return self._compute_fixed(hidden_states, index, weights)
        if self.cut is None:
            return self._compute(hidden_states, index, weights, packed)
        result = torch.empty_like(hidden_states)
        self.cut(lambda: result.copy_(self._compute(hidden_states, index, weights, packed)))
        return result

    def _is_packed(self, index: torch.Tensor) -> bool:
        """Return whether products with packed weights are faster, if each token's experts are drawn evenly."""
        tokens, each = index.shape
        return index.numel() <= self._few.packed_experts * drawn_evenly(self._module.num_experts, each, tokens)

    def _compute(
        self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, packed: bool
    ) -> torch.Tensor:
        """Return what the module's own `forward` does; `index` and `weights` are of shape (tokens, experts of each)."""
        if self._host:
            self._host.read(hidden_states, index.numel())
        chosen = index.flatten().tolist()  # waits for the router
        each, write = index.shape[1], self._packed if packed else self._expand
        outputs = hidden_states.new_zeros(len(chosen), hidden_states.shape[-1])
        for group in self._bring(chosen):
            place = {expert: number for number, expert in enumerate(group.experts)}
            pairs = [pair for pair, expert in enumerate(chosen) if expert in place]
            write(hidden_states, group, [(pair // each, place[chosen[pair]], pair) for pair in pairs], outputs)
        if self._host:  # meanwhile the device does what was launched
            self._host.compute()
            self._host.add_to(outputs)
        return _weighted(outputs, weights, hidden_states.dtype)

    def _compute_fixed(self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the same, by operations that are equal for every choice: the host only says where the experts are."""
        slabs, fixed = self._source.slabs, self._fixed_pairs(index)
        outputs = hidden_states.new_zeros(index.numel(), hidden_states.shape[-1])
        if self._source.has_all:
            self._counts.add(fixed.counted(index, self._module.num_experts))
            self._products(hidden_states, fixed.of_all(index), slabs, outputs)
        else:
            fixed.read(index)
            if self._host:
                self._host.read(hidden_states, index.numel())
            for part in fixed.parts():
                (self.cut or _now)(partial(fixed.fill, part, self._bring))
                self._products(hidden_states, fixed.on_device(part), slabs, outputs)
            if self._host:
                (self.cut or _now)(self._host.compute)
                self._host.add_to(outputs)
        return _weighted(outputs, weights, hidden_states.dtype)

    def _fixed_pairs(self, index: torch.Tensor) -> FixedPairs:
        if self._fixed is None or self._fixed.shape != index.shape:
            at_once = index.numel() if self._source.has_all else together(self._each.nbytes)
            self._fixed = FixedPairs(index.shape, at_once, index.device)
        return self._fixed

    def _bring(self, chosen: list[int]) -> Iterator[Group]:
        """Return groups of the distinct ones of the chosen experts, beside those for the host, and count them."""
        needed = sorted({expert for expert in chosen if expert < self._module.num_experts})  # a larger one is none
        self._counts.calls += 1
        self._counts.used += len(needed)
        if self._host:
            on_host = self._host.take(self._source.missing(needed), chosen)
            self._counts.on_host += len(on_host)
            self._counts.on_host_bytes += len(on_host) * self._each.nbytes
            needed = [expert for expert in needed if expert not in on_host]
        return self._source.bring(needed) if needed else iter(())

    def _packed(self, x: torch.Tensor, group: Group, pairs: list[tuple[int, int, int]], outputs: torch.Tensor) -> None:
        """Write the outputs of (token, number of the expert in the group, row of `outputs`), from packed weights."""
        lists = [(token, group.rows[number], at, pair) for at, (token, number, pair) in enumerate(pairs)]
        self._products(x, _on_device(list(zip(*lists, strict=True)), x.device), group.slabs, outputs)

    def _products(self, x: torch.Tensor, pairs: torch.Tensor, slabs: torch.Tensor, outputs: torch.Tensor) -> None:
        """The same of `pairs`: tokens, rows of `slabs`, 0, 1, … and rows of `outputs`."""
        tokens, rows, order, targets = pairs
        up = self._multiply("gate_up_proj" if self._module.has_gate else "up_proj", x, slabs, (tokens, rows, order))
        active = self._module._apply_gate(up) if self._module.has_gate else self._module.act_fn(up)
        self._multiply("down_proj", active, slabs, (order, rows, targets), outputs)

    def _multiply(
        self,
        key: str,
        x: torch.Tensor,
        slabs: torch.Tensor,
        pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        bias, transposed = self._names.get(f"{key}_bias"), self._module.is_transposed
        return multiply_packed(x, pairs, slabs, self._each, self._names[key], bias=bias, transposed=transposed, out=out)

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


def _now(between: Callable[[], object]) -> None:
    between()


def _weighted(outputs: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the sums over each token's experts; `outputs` has the rows of the first token's, then the second's, …"""
    return (outputs.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1).to(dtype)


def _on_device(numbers: Any, device: torch.device) -> torch.Tensor:
    """Return integers as a tensor on the device, copied without waiting."""
    made = torch.tensor(numbers, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)
