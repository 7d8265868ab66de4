"""The quantization format for any shape and any values: three implementations agree, and errors are what rounding allows."""

from itertools import product
from math import lcm

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from slabs import compare_kernel_interpreted, expanded, expanded_by_kernel, packed
from torch import nn

from zi_experiments.config.schema import Quant
from zi_experiments.cost_model.spec import ELEMENT_BYTES, Spec
from zi_experiments.engines.deepspeed import quantized as deepspeed_quantized
from zi_experiments.engines.stream import quantized
from zi_experiments.engines.stream.slab import ALIGNMENT
from zi_experiments.measurement.reference import round_trip
from zi_experiments.models.architecture import Parameter
from zi_experiments.models.packing import groupwise
from zi_experiments.planner import planning

DTYPES = (torch.float16, torch.bfloat16)
many = settings(deadline=None, derandomize=True)  # as many as conftest.py says


@st.composite
def formats(draw, group_sizes=(2, 4, 6, 8, 12, 32, 64, 96, 128)):
    return Quant(
        name="",
        bits=draw(st.sampled_from((4, 8))),
        group_size=draw(st.sampled_from(group_sizes)),
        group_dim=draw(st.sampled_from((0, 1))),
    )


@st.composite
def shapes(draw, quant):
    """A matrix of whole groups, or a stack of them; four columns at a time, as DeepSpeed's packed rows need."""
    groups, others = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    across = (quant.group_size * groups, 4 * others)
    along = (others, quant.group_size * groups * (1 if quant.group_size % 4 == 0 else 2))
    stack = draw(st.sampled_from(((), (), (1,), (3,))))
    return stack + (across if quant.group_dim == 0 else along)


def grouped(weight, quant):
    """The groups of a matrix, or of stacked ones, along the last dimension."""
    groups = weight.unflatten(quant.group_dim - 2, (-1, quant.group_size))
    return groups.movedim(quant.group_dim - 2, -1)


def ungrouped(groups, quant):
    return groups.movedim(-1, quant.group_dim - 2).flatten(quant.group_dim - 3, quant.group_dim - 2)


@st.composite
def ordinary(draw):
    """A format and weights in it: of any size and any distance from zero, of which some groups are constant."""
    quant = draw(formats())
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(draw(shapes(quant)), generator=generator)
    groups = grouped(weight, quant)
    groups[torch.rand(groups.shape[:-1], generator=generator) < 0.2] = draw(st.floats(-10, 10, width=16))
    size, shift = 10.0 ** draw(st.integers(-6, 3)), draw(st.sampled_from((0.0, 1.0, -1000.0)))
    return quant, (ungrouped(groups, quant) * size + shift).to(dtype)


@st.composite
def any_bits(draw):
    """A format and weights in it with any bits: infinite, subnormal, of either zero, and no numbers at all."""
    quant = draw(formats(group_sizes=(2, 4, 6, 8)))
    shape, dtype = draw(shapes(quant)), draw(st.sampled_from(DTYPES))
    count = torch.Size(shape).numel()
    palette = st.sampled_from((0x0000, 0x8000, 0x0001, 0x8001, 0x7BFF, 0xFBFF, 0x3C00, 0x3C01, 0x7C00, 0x7E00))
    bits = draw(st.lists(palette | st.integers(0, 2**16 - 1), min_size=count, max_size=count))
    return quant, torch.tensor(bits, dtype=torch.uint16).view(dtype).view(shape)


def same(one, other):
    """Whether two tensors are equal bit for bit; what is no number has many bits."""
    equal = (one.view(torch.int16) == other.view(torch.int16)) | (one.isnan() & other.isnan())
    return one.shape == other.shape and one.dtype == other.dtype and bool(equal.all())


def by_stream(weight, quant):
    slab, layout = packed({"weight": weight}, quant.bits, quant.group_size, quant.group_dim)
    return expanded(slab, layout, weight.dtype)["weight"]


def by_deepspeed(weight, quant):
    parameter = nn.Parameter(weight.clone(), requires_grad=False)
    deepspeed_quantized.quantize(parameter, quant)
    return deepspeed_quantized._expand(parameter)


def deepspeed_needs_cuda(weight, quant):
    """DeepSpeed expands these with a CUDA kernel only."""
    return weight.dtype is torch.float16 and quant.group_dim == 1 and quant.group_size % 8 == 0


@many
@given(ordinary() | any_bits())
def test_the_stream_engine_expands_what_the_reference_does(case):
    quant, weight = case

    assert same(by_stream(weight, quant), round_trip(weight, quant))


@many
@given(ordinary() | any_bits())
def test_deepspeed_expands_what_the_reference_does(case):
    quant, weight = case
    assume(not deepspeed_needs_cuda(weight, quant))

    assert same(by_deepspeed(weight, quant), round_trip(weight, quant))


@many
@given(ordinary())
def test_an_error_is_at_most_half_a_step_and_the_roundings_to_16_bits(case):
    quant, weight = case
    low, high = grouped(weight, quant).aminmax(dim=-1, keepdim=True)
    scale = (2**quant.bits - 1) / (high - low)
    assume((scale > 0).all())  # no range is beyond the type's largest number
    error = (grouped(round_trip(weight, quant), quant).double() - grouped(weight, quant).double()).abs()

    # `unit` is the largest relative error of a rounding. Of the difference to the minimum, its product with the scale
    # and the quotient by it, or else of the clamp to the largest code, which takes back what two of them added:
    unit = torch.finfo(weight.dtype).eps / 2
    reach = 4 * unit * (high.double() - low.double())
    # and of the sum with the minimum
    reach += unit * (1 + 8 * unit) * torch.maximum(low.double().abs(), high.double().abs())
    reach += torch.finfo(weight.dtype).smallest_normal * unit  # of subnormal numbers
    narrow = scale.isinf()
    half_a_step = torch.where(narrow, high.double() - low.double(), 0.5 / scale.double())
    assert (error <= half_a_step + reach).all()


@many
@given(ordinary())
def test_a_minimum_is_kept_and_the_order_of_a_group_too(case):
    quant, weight = case
    before, after = grouped(weight, quant), grouped(round_trip(weight, quant), quant)
    assume(after.isfinite().all())
    order = before.argsort(dim=-1, stable=True)

    assert torch.equal(after.amin(-1), before.amin(-1))
    assert (after.gather(-1, order).diff(dim=-1) >= 0).all()


@many
@given(ordinary() | any_bits())
def test_codes_are_in_range_and_packing_again_gives_the_same_bytes(case):
    quant, weight = case
    codes, scale, low = quantized._quantize(weight.reshape(-1, weight.shape[-1]), groupwise(quant).format)
    slab, layout = packed({"weight": weight}, quant.bits, quant.group_size, quant.group_dim)
    before = slab.clone()
    expanded(slab, layout, weight.dtype)

    assert codes.dtype is torch.uint8
    assert int(codes.max()) < 2**quant.bits
    assert (len(codes), len(scale), len(low)) == (
        weight.numel(),
        weight.numel() // quant.group_size,
        weight.numel() // quant.group_size,
    )
    assert torch.equal(slab, before), "expanding reads only"
    assert torch.equal(packed({"weight": weight}, quant.bits, quant.group_size, quant.group_dim)[0], before)


@many
@given(formats(), st.sampled_from(DTYPES), st.integers(-100, 100), st.data())
def test_weights_that_are_on_the_grid_already_are_kept(quant, dtype, start, data):
    """Steps of one, from end to end of the codes: scales are one, and nothing is rounded."""
    largest = 2**quant.bits - 1
    assume(dtype is torch.float16 or abs(start) + largest <= 256)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    groups = grouped(torch.zeros(data.draw(shapes(quant))), quant)
    groups.copy_(torch.randint(0, largest + 1, groups.shape, generator=generator))
    groups[..., 0], groups[..., -1] = 0, largest
    weight = (ungrouped(groups, quant) + start).to(dtype)

    once = round_trip(weight, quant)
    assert torch.equal(once, weight)
    assert same(round_trip(once, quant), once)


@many
@given(formats(), st.data())
def test_what_is_stored_takes_what_the_plan_says(compose_run, describe, machine, quant, data):
    run = compose_run()
    run.quant = quant
    spec = Spec(run=run, architecture=describe(run), machine=machine(), dtype="bfloat16")
    shape = data.draw(shapes(quant))
    weight = torch.zeros(shape, dtype=torch.bfloat16)
    stored = nn.Parameter(weight.clone(), requires_grad=False)
    deepspeed_quantized.quantize(stored, quant)
    planned = spec.stored_numel(Parameter(name="weight", shape=shape, quantizable=True, layer=0))

    assert stored.numel() == planned
    slab, layout = packed({"weight": weight}, quant.bits, quant.group_size, quant.group_dim)
    groups = (quant.group_size, layout.elements // quant.group_size)
    flat = groups if quant.group_dim == 0 else groups[::-1]
    whole = spec.stored_numel(Parameter(name="weight", shape=flat, quantizable=True, layer=0))
    padding = sum(region.stop - region.start for region in layout.regions) - whole * ELEMENT_BYTES
    assert 0 <= layout.elements - weight.numel() < lcm(quant.group_size, ALIGNMENT // ELEMENT_BYTES)
    assert 0 <= padding < 3 * ALIGNMENT
    assert layout.regions[2].stop <= len(slab)


@many
@given(formats(group_sizes=(2, 3, 4, 6)), st.tuples(st.integers(1, 16), st.integers(1, 16)))
def test_the_planner_takes_the_shapes_that_deepspeed_can_pack(quant, shape):
    """Four INT4 columns, or two of INT8, fill a 16-bit element."""
    weight = torch.zeros(shape, dtype=torch.bfloat16)
    parameter = Parameter(name="weight", shape=shape, quantizable=True, layer=0)
    try:
        packable = same(by_deepspeed(weight, quant), weight)
    except (AssertionError, RuntimeError):
        packable = False

    assert planning._can_group(parameter, quant.bits, quant.group_dim, quant.group_size) == packable


def special_groups(dtype):
    """Twelve groups of 32 at the edges of the format, by name."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(32, generator=generator)
    limits = torch.finfo(dtype)
    zeros = torch.zeros(32)
    zeros[::3] = -0.0
    groups = {
        "ordinary": noise - 0.5,
        "constant": torch.full((32,), 0.3),
        "far from zero": 1000 + noise,
        "both zeros": zeros,
        "one of them differs": torch.nn.functional.one_hot(torch.tensor(5), 32) * 2.0,
        "a narrow range": 0.1 + noise * 0.002,
        "a very narrow range": 0.1 + noise * 0.0002,
        "subnormal": noise * limits.smallest_normal,
        "a range up to the largest": noise * limits.max,
        "a range beyond the largest": (noise - 0.5) * 2 * limits.max,
        "infinite": torch.where(noise > 0.9, torch.inf, noise),
        "no number": torch.where(noise > 0.9, torch.nan, noise),
    }
    return {name: group.to(dtype) for name, group in groups.items()}


@pytest.mark.parametrize(("bits", "dtype"), product((4, 8), DTYPES))
def test_special_groups(bits, dtype):
    """What the format makes of them, DeepSpeed's code as well as ours: it is finite up to the type's largest number."""
    groups = special_groups(dtype)
    weight = torch.stack(list(groups.values()))
    quant = Quant(name="", bits=bits, group_size=32, group_dim=1)
    found = dict(zip(groups, round_trip(weight, quant), strict=True))
    lost = {"a range beyond the largest", "infinite", "no number"}

    assert {name for name, group in found.items() if not group.isfinite().all()} == lost
    assert same(by_stream(weight, quant), round_trip(weight, quant))
    upright = by_deepspeed(weight.T.contiguous(), Quant(name="", bits=bits, group_size=32, group_dim=0))
    assert same(upright.T.contiguous(), round_trip(weight, quant))
    assert torch.equal(found["constant"], groups["constant"])
    assert same(found["both zeros"], torch.zeros(32, dtype=dtype)), "all are positive"


@pytest.mark.parametrize(("bits", "widest"), [(4, 15 / 65504), (8, 255 / 65504)])
def test_a_group_whose_scale_overflows_float16_becomes_its_minimum(bits, widest):
    """A limit of the format, in DeepSpeed's code too: in INT8 for ranges below 0.0039. bfloat16 has none like it."""
    quant = Quant(name="", bits=bits, group_size=64, group_dim=0)
    below = torch.linspace(0, 0.98 * widest, 64).half().view(64, 1).repeat(1, 4)
    above = torch.linspace(0, 1.02 * widest, 64).half().view(64, 1).repeat(1, 4)

    for expand in (round_trip, by_stream, by_deepspeed):
        assert torch.equal(expand(below, quant), torch.zeros(64, 4).half())
        assert expand(above, quant).unique().numel() > 2
        assert expand(below.bfloat16(), quant).unique().numel() > 2


def compare_kernel():
    """In a process whose Triton interprets: the kernel against the reference, on special groups."""
    weight = torch.stack(list(special_groups(torch.float16).values()))
    for bits, dim in product((4, 8), (0, 1)):
        quant = Quant(name="", bits=bits, group_size=32, group_dim=dim)
        matrix = weight if dim == 1 else weight.T.contiguous()
        slab, layout = packed({"weight": matrix}, bits, 32, dim)
        found, expected = expanded_by_kernel(slab, layout, matrix.dtype)["weight"], round_trip(matrix, quant)
        assert same(found, expected), (bits, dim, found[~torch.isclose(found, expected, equal_nan=True)])


def test_the_kernel_expands_special_groups_as_the_reference_does():
    done = compare_kernel_interpreted(__file__)

    assert done.returncode == 0, done.stderr[-3000:]
