"""Packed into a slab and expanded again, in torch or by the Triton kernel, weights are what the format's definition says."""

from itertools import product

import pytest
import torch
from families import group_quantize
from slabs import by_kernel, compare_kernel_interpreted, expanded, expanded_by_kernel, packed
from torch import nn

from zi_experiments.engines.stream import quantized
from zi_experiments.engines.stream.packed_linear import PackedLinears
from zi_experiments.engines.stream.slab import expanded_experts, experts_in, plain_views


def matrices(group_size, group_dim, dtype):
    """A matrix, stacked matrices, experts with biases, a norm; no numbers of elements that the kernel's programs divide."""
    generator = torch.Generator().manual_seed(group_size)
    shapes = {"up": (7, 5 * group_size), "experts": (3, 10, group_size), "norm": (100,)}
    shapes |= {"routed.up": (5, 6, group_size), "routed.bias": (5, 7), "routed.down": (5, 2, 3 * group_size)}
    if group_dim == 0:
        shapes |= {"up": (5 * group_size, 14), "experts": (3, 2 * group_size, 10)}
        shapes |= {"routed.up": (5, group_size, 6), "routed.down": (5, 3 * group_size, 2)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("bits", "group_size", "group_dim", "dtype"),
    product((4, 8), (32, 64, 96, 128), (0, 1), (torch.float16, torch.bfloat16)),
)
def test_what_is_expanded_is_what_the_definition_says(bits, group_size, group_dim, dtype):
    weights = matrices(group_size, group_dim, dtype)
    slab, layout = packed(weights, bits, group_size, group_dim)
    found = expanded(slab, layout, dtype)

    assert set(found) == {"up", "experts", "routed.up", "routed.down"}
    for name, weight in found.items():
        assert torch.equal(weight, group_quantize(weights[name], bits, group_size, group_dim)), name
    for name in ("norm", "routed.bias"):
        assert torch.equal(plain_views(slab, layout, dtype)[name], weights[name]), "nothing is written over it"


def chosen_experts(slab, layout, chosen, dtype):
    """Some of the experts in a slab, expanded."""
    each = layout.experts.each
    out = torch.full((layout.experts.elements(len(chosen)),), torch.nan, dtype=dtype)
    quantized.expand_experts(experts_in(slab, layout), each, out, torch.tensor(chosen))
    return expanded_experts(out, each, len(chosen))


@pytest.mark.parametrize(("bits", "group_dim"), product((4, 8), (0, 1)))
def test_chosen_experts_are_expanded_in_their_order(bits, group_dim):
    weights = matrices(64, group_dim, torch.bfloat16)
    slab, layout = packed(weights, bits, 64, group_dim)

    for name, found in chosen_experts(slab, layout, [4, 1], torch.bfloat16).items():
        assert torch.equal(found, group_quantize(weights[name], bits, 64, group_dim)[[4, 1]]), name


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
    for bits, group_size, group_dim, dtype in CELLS:
        weights = matrices(group_size, group_dim, dtype) | {
            "flat": torch.full((group_size, group_size), 0.25, dtype=dtype)
        }
        slab, layout = packed(weights, bits, group_size, group_dim)
        for name, mine in expanded_by_kernel(slab, layout, dtype).items():
            theirs = expanded(slab, layout, dtype)[name]
            if dtype is torch.float16:
                assert torch.equal(mine, theirs), (bits, group_size, group_dim, name)
                continue
            # Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest: once after the division, whose
            # quotient is at most the sum and the group's minimum together, and once after the addition
            low = minima_of(weights[name], group_size, group_dim)
            ulps = torch.finfo(dtype).eps * ((theirs - low).abs() + theirs.abs()).float()
            assert ((mine - theirs).float().abs() <= ulps).all(), (bits, group_size, group_dim, name)
        theirs = chosen_experts(slab, layout, [4, 1], dtype)
        with by_kernel():
            for name, mine in chosen_experts(slab, layout, [4, 1], dtype).items():
                assert torch.allclose(mine, theirs[name], atol=0.05), (bits, group_size, group_dim, name)


def minima_of(weight, group_size, group_dim):
    groups = weight.unflatten(group_dim - 2, (-1, group_size))
    return groups.amin(group_dim - 2, keepdim=True).expand_as(groups).reshape(weight.shape)


def test_the_kernel_expands_what_torch_does():
    done = compare_kernel_interpreted(__file__)

    assert done.returncode == 0, done.stderr[-3000:]


def products(by_columns, dtype, bits, group_size):
    """Rows times the matrices of packed experts with biases, by the kernel and from the expanded matrices."""
    shape = (3, 2 * group_size + 8, 5 * group_size) if by_columns else (3, 21, 5 * group_size)
    generator = torch.Generator().manual_seed(1)
    outputs, inputs = (shape[2], shape[1]) if by_columns else (shape[1], shape[2])
    weights = {
        "routed.other": torch.randn(3, 4, group_size, generator=generator).to(dtype),
        "routed.up": torch.randn(shape, generator=generator).to(dtype),
        "routed.bias": torch.randn(3, outputs, generator=generator).to(dtype),
    }
    slab, layout = packed(weights, bits, group_size, 1)
    x = torch.randn(2, inputs, generator=generator).to(dtype)
    tokens, experts, targets = torch.tensor([[0, 1, 1], [2, 0, 2], [3, 0, 1]])
    out = torch.full((5, outputs), torch.nan, dtype=dtype)
    pairs, (experts_slab, each) = (tokens, experts, targets), (experts_in(slab, layout), layout.experts.each)
    quantized.multiply_packed(
        x, pairs, experts_slab, each, "routed.up", bias="routed.bias", transposed=by_columns, out=out
    )
    for token, expert, target in zip(tokens, experts, targets, strict=True):
        matrix = group_quantize(weights["routed.up"][expert], bits, group_size, 1).double()
        expected = x[token].double() @ (matrix if by_columns else matrix.T) + weights["routed.bias"][expert].double()
        yield out[target].double(), expected
    assert out[[2, 4]].isnan().all(), "other rows stay as they were"


def compare_products():
    """In a process whose Triton interprets: products with packed experts against products with expanded ones."""
    from zi_experiments.engines.stream import product_kernel

    product_kernel.CHUNK = 64  # several of them, the last one not whole
    for case in product((False, True), (torch.float16, torch.bfloat16), (4, 8), (32, 64, 128)):
        for mine, theirs in products(*case):
            tolerance = 0.003 if case[1] is torch.float16 else 0.05  # which is cut off here, not rounded
            error = (mine - theirs).norm() / theirs.norm()
            assert error <= tolerance, (case, error)


def compare_linears():
    """In a process whose Triton interprets: linear layers that multiply packed weights, and the same expanded."""
    layer = nn.ModuleDict(
        {"a": nn.Linear(128, 48), "b": nn.Linear(48 * 4, 64, bias=False), "norm": nn.LayerNorm(64)}
    ).half()
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    slab, layout = packed(weights, 4, 64, 1)
    for name, value in expanded(slab, layout, torch.float16).items():
        layer.get_parameter(name).data = value
    with by_kernel():
        linears = PackedLinears(layer, slab, layout)
        assert linears.complete
        for name, width in (("a", 128), ("b", 192)):
            x = torch.randn(2, 1, width, generator=torch.Generator().manual_seed(1)).half()
            expected = layer[name](x)
            with linears.used():
                layer[name].weight.data.zero_()  # what is expanded is not read
                torch.testing.assert_close(layer[name](x), expected, rtol=0.01, atol=0.01)
        layer["a"] = nn.Bilinear(4, 4, 4)
        assert not PackedLinears(layer, slab, layout).complete


def test_linear_layers_with_packed_weights_compute_as_expanded_ones_do():
    done = compare_kernel_interpreted(__file__, "compare_linears")

    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.integration
def test_products_with_packed_experts_are_those_with_expanded_ones():
    done = compare_kernel_interpreted(__file__, "compare_products")

    assert done.returncode == 0, done.stderr[-3000:]
