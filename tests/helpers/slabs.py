"""Slabs of quantized weights, packed and expanded by the stream engine."""

import os
import subprocess
import sys

import torch
from places import HELPERS

from zi_experiments.config.schema import Quant
from zi_experiments.engines.stream import quantized
from zi_experiments.engines.stream.slab import lay_out, plain_views, views
from zi_experiments.models.architecture import Parameter


def packed(weights, bits, group_size, group_dim):
    """A slab of these weights, with its layout; vectors stay as they are."""
    quant = Quant(name="", bits=bits, group_size=group_size, group_dim=group_dim)
    parameters = [
        (name, Parameter(name=f"layers.0.{name}", shape=tuple(w.shape), quantizable=w.dim() > 1, layer=0))
        for name, w in weights.items()
    ]
    layout = lay_out(parameters, {p.name for _, p in parameters if p.quantizable}, quant, shares=1)
    slab = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for place in layout.quantized:
        quantized.pack(weights[place.name], slab, layout, place)
    for place in layout.plain:
        plain_views(slab, layout, weights[place.name].dtype)[place.name].copy_(weights[place.name])
    return slab, layout


def expanded(slab, layout, dtype):
    out = torch.full((layout.elements,), torch.nan, dtype=dtype)
    quantized.expand(slab, layout, out)
    return views(out, layout.quantized)


def compare_kernel_interpreted(file):
    """The finished process of a test file's `compare_kernel`, where Triton interprets its kernels from the start."""
    return subprocess.run(
        [sys.executable, "-c", "import runpy, sys; runpy.run_path(sys.argv[1])['compare_kernel']()", file],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HELPERS)},
        capture_output=True,
        text=True,
    )
