"""A quantized embedding gives the rows that are looked up, and reads no others."""

import pytest
import torch
from torch import nn

from zi_experiments.config.schema import Quant
from zi_experiments.engines.deepspeed.quantized import expand_in_forward, quantize
from zi_experiments.measurement.reference import round_trip

IDS = torch.tensor([[3, 0, 127], [64, 63, 3]])


def embedding(quant):
    module = nn.Embedding(128, 64, dtype=torch.bfloat16)
    weight = module.weight.detach().clone()
    quantize(module.weight, quant)
    expand_in_forward(module)
    return module, weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_dim", [0, 1])
def test_a_lookup_gives_the_rows_of_the_expanded_table(bits, group_dim):
    quant = Quant(name="", bits=bits, group_size=32, group_dim=group_dim)
    module, weight = embedding(quant)

    assert torch.equal(module(IDS), round_trip(weight, quant)[IDS])
    assert module.weight.dim() == 1, "the parameter is as it was: packed and flat"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_has_the_whole_matrix(bits, group_dim, dtype):
    """In float16 too: there DeepSpeed itself looks for its CUDA kernel, whatever the device."""
    quant = Quant(name="", bits=bits, group_size=32, group_dim=group_dim)
    module = nn.Linear(64, 128, bias=False, dtype=dtype)
    weight = module.weight.detach().clone()
    quantize(module.weight, quant)
    expand_in_forward(module)
    inputs = torch.randn(3, 64, dtype=dtype)

    assert torch.equal(module(inputs), inputs @ round_trip(weight, quant).T)


def test_an_embedding_that_multiplies_with_its_table_has_all_of_it():
    class Scored(nn.Embedding):
        def forward(self, ids):
            return torch.nn.functional.linear(super().forward(ids), self.weight)

    quant = Quant(name="", bits=4, group_size=32, group_dim=1)
    module = Scored(128, 64, dtype=torch.bfloat16)
    table = round_trip(module.weight.detach().clone(), quant)
    quantize(module.weight, quant)
    expand_in_forward(module)

    assert torch.equal(module(IDS), table[IDS] @ table.T)


def test_a_lookup_expands_no_other_rows():
    """Of 50,272 rows only 6 are expanded: nothing as large as the table is allocated."""
    module = nn.Embedding(50272, 64, dtype=torch.bfloat16)
    quantize(module.weight, Quant(name="", bits=4, group_size=64, group_dim=1))
    expand_in_forward(module)

    with torch.profiler.profile(profile_memory=True) as profile:
        module(IDS)

    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 50272 * 64 / 10
