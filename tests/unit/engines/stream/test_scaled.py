"""Codes of checkpoints, written into a slab and expanded by torch or by the Triton kernel, are what transformers expands."""

from itertools import product

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from slabs import by_kernel, compare_kernel_interpreted
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from zi_experiments.engines.stream import quantized, scaled
from zi_experiments.engines.stream.slab import expanded_experts, expanded_views, experts_in, lay_out
from zi_experiments.models.architecture import Parameter
from zi_experiments.models.native import Packed
from zi_experiments.models.packing import Code, Format, Packing

BLOCKS = Format(name="FP8", code=Code.e4m3, bits=8, group=(128, 128), numbers=(4,))
SMALL_BLOCKS = Format(name="FP8", code=Code.e4m3, bits=8, group=(4, 32), numbers=(1,))
MXFP4 = Format(name="MXFP4", code=Code.e2m1, bits=4, group=(1, 32), numbers=(1,))
INT4 = Format(name="INT4", code=Code.signed, bits=4, group=(1, 32), numbers=(2,))
INT8 = Format(name="INT8", code=Code.signed, bits=8, group=(1, 8), numbers=(2,))
# shapes of parameters, with the parts of their rows; `routed` ones are stacks of experts
CASES = {
    "blocks": (BLOCKS, {"a": ((128, 256), 1), "b": ((200, 300), 1), "c": ((3, 5), 1)}),
    "experts in blocks": (
        BLOCKS,
        {"routed.up": ((3, 2 * 140, 130), 2), "routed.down": ((3, 130, 140), 1), "a": ((7, 9), 1)},
    ),
    "exponents": (SMALL_BLOCKS, {"a": ((12, 96), 1), "routed.up": ((3, 8, 64), 1)}),
    "mxfp4": (MXFP4, {"routed.up": ((3, 96, 40), 1), "routed.down": ((3, 64, 36), 1), "a": ((2, 32, 6), 1)}),
    "int4": (INT4, {"a": ((12, 96), 1), "routed.up": ((3, 2 * 6, 64), 2), "routed.down": ((3, 10, 32), 1)}),
    "int8": (INT8, {"a": ((12, 96), 1), "b": ((3, 4, 8), 1)}),
}

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


class Slab:
    """Random codes of all values, and scales from the smallest to the largest, in a slab on a device."""

    def __init__(self, format, shapes, dtype, device="cpu"):
        generator = torch.Generator().manual_seed(0)
        transposed, self.packed, parameters, packings = format is MXFP4, {}, [], {}
        self.dtype = dtype
        for name, (shape, parts) in shapes.items():
            packing = Packing(format=format, parts=parts, transposed=transposed)
            experts = "layers.0" if name.startswith("routed") else None
            parameters.append((name, Parameter(name=name, shape=shape, quantizable=True, layer=0, experts=experts)))
            one = packed(packing, shape, dtype, generator)
            packings[name] = packing
            self.packed[name] = Packed(codes=one.codes.to(device), scales=one.scales.to(device))
        self.layout = lay_out(parameters, packings)
        self.bytes = torch.full((self.layout.nbytes,), 85, dtype=torch.uint8, device=device)
        for place in self.layout.quantized:
            scaled.write(self.packed[place.name], self.bytes[None], self.layout, place)
        for place in self.layout.experts.each.quantized if self.layout.experts else ():
            scaled.write(self.packed[place.name], experts_in(self.bytes, self.layout), self.layout.experts.each, place)

    def expanded(self):
        out = self.empty(self.layout.elements)
        quantized.expand(self.bytes, self.layout, out)
        return expanded_views(out, self.layout)

    def chosen(self, experts):
        each = self.layout.experts.each
        out = self.empty(self.layout.experts.elements(len(experts)))
        chosen = torch.tensor(experts, device=out.device)
        quantized.expand_experts(experts_in(self.bytes, self.layout), each, out, chosen)
        return expanded_experts(out, each, len(experts))

    def empty(self, elements):
        return torch.full((elements,), torch.nan, dtype=self.dtype, device=self.bytes.device)


def packed(packing, shape, dtype, generator):
    (matrices, rows, columns), format = packing.codes(shape), packing.format
    codes = torch.randint(256, (matrices, rows, columns * format.bits // 8), generator=generator).to(torch.uint8)
    if format.code is Code.e4m3:
        codes[codes & 127 == 127] -= 1
    grid = matrices, -(-rows // format.group[0]), -(-columns // format.group[1])
    if format.numbers == (1,):
        return Packed(codes=codes, scales=torch.randint(255, grid, generator=generator).to(torch.uint8))
    largest = 10 if format.numbers == (2,) else 60  # of which codes of zero make something in 16 bits
    exponents = torch.randint(-largest, largest, grid, generator=generator)
    scales = torch.rand(grid, generator=generator) * 2.0**exponents
    return Packed(codes=codes, scales=scales.to(dtype) if format.numbers == (2,) else scales)


def by_transformers(one, format, shape, dtype):
    """A parameter; blocks at the edge of a matrix are dequantized by themselves, since transformers knows whole ones only."""
    if format.code is Code.signed:
        return torch.stack(
            [by_compressed_tensors(*pair, format) for pair in zip(one.codes, one.scales, strict=True)]
        ).view(shape)
    if format is MXFP4:
        blocks = one.codes.unflatten(-1, (-1, 16))
        return convert_moe_packed_tensors(blocks, one.scales, dtype=dtype).view(shape)
    out = torch.empty(*one.codes.shape, dtype=dtype, device=one.codes.device)
    height, width = format.group
    for matrix, codes, scales in zip(out, one.codes, one.scales, strict=True):
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                at = slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)
                block = codes[at].view(torch.float8_e4m3fn)
                scale = scales[row : row + 1, column : column + 1]
                matrix[at] = Fp8Dequantize(None)._dequantize_one(block, scale, output_dtype=dtype)
    return out.view(shape)


def by_compressed_tensors(codes, scales, format):
    unpacked = unpack_from_int32(
        codes.view(torch.int32), format.bits, torch.Size([len(codes), codes.shape[1] * 8 // format.bits])
    )
    args = QuantizationArgs(num_bits=format.bits, strategy="group", group_size=format.group[1])
    return dequantize(unpacked, scales, args=args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_what_is_expanded_is_what_transformers_dequantizes(case, dtype, device):
    """By the kernel on a GPU, by torch on a CPU; what transformers makes of it is made on the same device."""
    format, shapes = CASES[case]
    slab = Slab(format, shapes, dtype, device)
    found = slab.expanded()

    assert set(found) == set(shapes)
    for name, weight in found.items():
        expected = by_transformers(slab.packed[name], format, shapes[name][0], dtype)
        assert torch.equal(weight, expected), name
        if dtype is torch.float16 and format.numbers != (2,) and weight.numel() > 500:
            assert weight.isinf().any(), "extremes are among them"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [name for name in CASES if "routed.up" in CASES[name][1]])
def test_chosen_experts_are_expanded_in_their_order(case, device):
    slab = Slab(*CASES[case], torch.bfloat16, device)
    whole = slab.expanded()

    for name, found in slab.chosen([2, 0]).items():
        assert torch.equal(found, whole[name][[2, 0]]), name


def compare_kernel():
    """In a process whose Triton interprets: the kernel against torch."""
    for (case, cell), dtype in product(CASES.items(), (torch.float16, torch.bfloat16)):
        slab = Slab(*cell, dtype)
        theirs = slab.expanded() | some(slab)
        with by_kernel():
            mine = slab.expanded() | some(slab)
        for name, expected in theirs.items():
            if dtype is torch.float16:
                assert torch.equal(mine[name], expected), (case, name)
            else:  # Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest, and its subnormal numbers more
                near = torch.isclose(mine[name].float(), expected.float(), rtol=2**-7, atol=2**-126)
                assert (near | expected.isinf()).all(), (case, name)


def some(slab):
    found = slab.chosen([2, 0]) if slab.layout.experts else {}
    return {f"some of {name}": weight for name, weight in found.items()}


def test_the_kernel_expands_what_torch_does():
    done = compare_kernel_interpreted(__file__)

    assert done.returncode == 0, done.stderr[-3000:]
