"""Experts of a layer in a slab, beside a module that has all of them; and what a plain model's routers choose."""

from functools import partial

import families
import tiny
import torch
from slabs import packings, parameter

from zi_experiments.config.schema import Quant
from zi_experiments.engines.stream import quantized
from zi_experiments.engines.stream.slab import expanded_views, experts_in, lay_out, plain_views
from zi_experiments.models.structure import is_experts_module

EXPERTS = 8
# gated, with biases and transposed matrices, without a gate
FAMILIES = {
    "mixtral": {"num_local_experts": EXPERTS, "hidden_size": 64, "intermediate_size": 96},
    "gpt_oss": {"num_local_experts": EXPERTS, "hidden_size": 64, "intermediate_size": 64},
    "nemotron_h": {"n_routed_experts": EXPERTS, "hidden_size": 64, "moe_intermediate_size": 96},
}
CPU = torch.device("cpu")


class Stack:
    """The experts of a layer in a slab, and a module that has all of them, expanded."""

    def __init__(self, family, bits):
        self.module = module_of(family)
        weights = {
            f"routed.{name}": torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))).bfloat16() / 8
            for name, p in self.module.named_parameters()
        }
        quant = Quant(name="", bits=bits, group_size=32 if bits < 16 else None, group_dim=1 if bits < 16 else None)
        parameters = [(name, parameter(name, weight)) for name, weight in weights.items()]
        layout = lay_out(parameters, packings(parameters, quant))
        slab = torch.zeros(layout.nbytes, dtype=torch.uint8)
        self.experts, self.each = experts_in(slab, layout), layout.experts.each
        for name, view in plain_views(slab, layout, torch.bfloat16).items():
            view.copy_(weights[name])
        for place in self.each.quantized:
            for one, weight in zip(self.experts, weights[place.name], strict=True):
                quantized.pack(weight, one, self.each, place)
        self.expanded = torch.empty(layout.elements, dtype=torch.bfloat16)
        quantized.expand(slab, layout, self.expanded)
        whole = plain_views(slab, layout, torch.bfloat16) | expanded_views(self.expanded.clone(), layout)
        for name, value in whole.items():
            self.module._parameters[name.rpartition(".")[2]] = torch.nn.Parameter(value, requires_grad=False)


def module_of(family):
    """An experts module of a family, as its models have it."""
    config = tiny.AutoConfig.for_model(family, **FAMILIES[family])
    config._experts_implementation = "grouped_mm"
    classes = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["modules"])
    kind = next(value for name, value in vars(classes).items() if name.endswith("Experts"))
    module = kind(config)
    assert is_experts_module(module)
    assert module.num_experts == EXPERTS
    return module


def tokens_of(count, seed):
    """Hidden states, and two experts of each token with their weights."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count, 64, generator=generator).bfloat16()
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(count)])
    return states, index, torch.rand(count, 2, generator=generator).bfloat16()


def generated_by(model, ids):
    """The tokens that a plain model generates, and what its routers choose in decode steps: (layer, set of experts)."""
    chosen = []

    def see(module, args, kwargs, layer):
        if len(args[0]) == len(ids):
            chosen.append((layer, set(args[1].flatten().tolist())))

    for number, layer in enumerate(model.model.layers):
        (experts,) = (module for module in layer.modules() if is_experts_module(module))
        experts.register_forward_pre_hook(partial(see, layer=number), with_kwargs=True)
    return families.generate(model, ids), chosen
