"""Packed into a slab and expanded again, in torch or by the Triton kernel, weights are what the format's definition says."""

from itertools import product

import pytest
import torch
from families import group_quantize
from slabs import compare_kernel_interpreted, expanded, packed

from zi_experiments.engines.stream import quantized
from zi_experiments.engines.stream.slab import plain_views, views


def matrices(group_size, group_dim, dtype):
    """A matrix, stacked experts and a norm; no numbers of elements that the kernel's programs divide."""
    generator = torch.Generator().manual_seed(group_size)
    shapes = {"up": (7, 5 * group_size), "experts": (3, 10, group_size), "norm": (100,)}
    if group_dim == 0:
        shapes |= {"up": (5 * group_size, 14), "experts": (3, 2 * group_size, 10)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("bits", "group_size", "group_dim", "dtype"),
    product((4, 8), (32, 64, 96, 128), (0, 1), (torch.float16, torch.bfloat16)),
)
def test_what_is_expanded_is_what_the_definition_says(bits, group_size, group_dim, dtype):
    weights = matrices(group_size, group_dim, dtype)
    slab, layout = packed(weights, bits, group_size, group_dim)
    found = expanded(slab, layout, dtype)

    assert set(found) == {"up", "experts"}
    for name, weight in found.items():
        assert torch.equal(weight, group_quantize(weights[name], bits, group_size, group_dim)), name
    assert torch.equal(plain_views(slab, layout, dtype)["norm"], weights["norm"]), "nothing is written over it"


@pytest.mark.parametrize("group_dim", [0, 1])
def test_rows_packed_some_at_a_time_are_the_same(monkeypatch, group_dim):
    weights = matrices(64, group_dim, torch.bfloat16)
    at_once, _ = packed(weights, 4, 64, group_dim)
    monkeypatch.setattr(quantized, "BLOCK", 1)  # elements: one row of groups at a time

    assert torch.equal(packed(weights, 4, 64, group_dim)[0], at_once)


@pytest.mark.parametrize(("bits", "group_dim"), product((4, 8), (0, 1)))
def test_a_group_of_equal_values_is_kept(bits, group_dim):
    """Its scale is infinite."""
    weights = {"flat": torch.full((64, 128), -0.3, dtype=torch.float16), "zero": torch.zeros(64, 64).half()}
    weights["flat"][1::2, 64:] = 0.25
    slab, layout = packed(weights, bits, 64, group_dim)
    found = expanded(slab, layout, torch.float16)

    assert torch.equal(found["zero"], weights["zero"])
    assert torch.equal(found["flat"][:, :64], weights["flat"][:, :64])
    assert torch.equal(found["flat"], weights["flat"]) or group_dim == 0
    assert torch.isfinite(found["flat"]).all()


CELLS = list(product((4, 8), (32, 96), (0, 1), (torch.float16, torch.bfloat16)))


def compare_kernel():
    """In a process whose Triton interprets: the kernel against torch."""
    from zi_experiments.engines.stream.kernel import expand_spans

    for bits, group_size, group_dim, dtype in CELLS:
        weights = matrices(group_size, group_dim, dtype) | {
            "flat": torch.full((group_size, group_size), 0.25, dtype=dtype)
        }
        slab, layout = packed(weights, bits, group_size, group_dim)
        codes, scales, minima = (slab[region] for region in layout.regions)
        out = torch.full((layout.elements,), torch.nan, dtype=dtype)
        expand_spans(codes, scales.view(dtype), minima.view(dtype), out, quantized.spans(layout), layout.quant)
        for name, mine in views(out, layout.quantized).items():
            theirs = expanded(slab, layout, dtype)[name]
            if dtype is torch.float16:
                assert torch.equal(mine, theirs), (bits, group_size, group_dim, name)
                continue
            # Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest: once after the division, whose
            # quotient is at most the sum and the group's minimum together, and once after the addition
            low = minima_of(weights[name], group_size, group_dim)
            ulps = torch.finfo(dtype).eps * ((theirs - low).abs() + theirs.abs()).float()
            assert ((mine - theirs).float().abs() <= ulps).all(), (bits, group_size, group_dim, name)


def minima_of(weight, group_size, group_dim):
    groups = weight.unflatten(group_dim - 2, (-1, group_size))
    return groups.amin(group_dim - 2, keepdim=True).expand_as(groups).reshape(weight.shape)


def test_the_kernel_expands_what_torch_does():
    done = compare_kernel_interpreted(__file__)

    assert done.returncode == 0, done.stderr[-3000:]
