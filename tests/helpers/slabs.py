"""Slabs of quantized weights, packed and expanded by the stream engine."""

import os
import subprocess
import sys
from contextlib import contextmanager

import torch
from places import HELPERS

from zi_experiments.config.schema import Quant
from zi_experiments.engines.stream import quantized
from zi_experiments.engines.stream.slab import expanded_views, experts_in, lay_out, plain_views
from zi_experiments.models.architecture import Parameter
from zi_experiments.models.packing import groupwise


def packed(weights, bits, group_size, group_dim):
    """A slab of these weights, with its layout; vectors and biases stay as they are, and `routed` ones are experts."""
    quant = Quant(name="", bits=bits, group_size=group_size, group_dim=group_dim)
    parameters = [(name, parameter(name, w)) for name, w in weights.items()]
    layout = lay_out(parameters, packings(parameters, quant))
    slab = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for place in layout.quantized:
        quantized.pack(weights[place.name], slab, layout, place)
    for place in layout.experts.each.quantized if layout.experts else ():
        for one, value in zip(experts_in(slab, layout), weights[place.name], strict=True):
            quantized.pack(value, one, layout.experts.each, place)
    for name, view in plain_views(slab, layout, next(iter(weights.values())).dtype).items():
        view.copy_(weights[name])
    return slab, layout


def packings(parameters, quant):
    """How these parameters, given with their names in the layer, are stored."""
    return {} if quant.bits == 16 else {p.name: groupwise(quant) for _, p in parameters if p.quantizable}


def parameter(name, weight):
    return Parameter(
        name=f"layers.0.{name}",
        shape=tuple(weight.shape),
        quantizable=weight.dim() > 1 and "bias" not in name,
        layer=0,
        experts="layers.0" if name.startswith("routed") else None,
    )


def expanded(slab, layout, dtype):
    out = torch.full((layout.elements,), torch.nan, dtype=dtype)
    quantized.expand(slab, layout, out)
    return expanded_views(out, layout)


def expanded_by_kernel(slab, layout, dtype):
    """The same by the Triton kernel, also where there is no GPU: in a process whose Triton interprets."""
    out = torch.full((layout.elements,), torch.nan, dtype=dtype)
    with by_kernel():
        quantized.expand(slab, layout, out)
    return expanded_views(out, layout)


@contextmanager
def by_kernel():
    """Expand with the kernel whatever the device."""
    usual, quantized.uses_kernel = quantized.uses_kernel, lambda slabs: True
    try:
        yield
    finally:
        quantized.uses_kernel = usual


def compare_kernel_interpreted(file, function="compare_kernel"):
    """The finished process of a function of a test file, where Triton interprets its kernels from the start."""
    return subprocess.run(
        [sys.executable, "-c", "import runpy, sys; runpy.run_path(sys.argv[1])[sys.argv[2]]()", file, function],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HELPERS)},
        capture_output=True,
        text=True,
    )
