"""Products of few rows on the host, with weights in 16 bits or as they are packed: at the rate at which cores read memory.

torch's own read bfloat16 at less than a half of that on some machines, and INT4 in a layout of their own only. The kernel is
compiled for this processor when it is first used, and kept in the user's cache.
"""

import ctypes
import hashlib
import os
import re
import subprocess
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from zi_experiments import environment
from zi_experiments.engines.stream.quantized import packed_matrix
from zi_experiments.engines.stream.slab import Layout, Place
from zi_experiments.system import toolchain

SOURCE = Path(__file__).with_suffix(".c")
OPTIONS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
STEP = 32  # inputs, and a group of them, are multiples of it
MOST_ROWS = 16  # with more of them, torch's products of 16-bit weights are faster


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "minima", "bias")),
        *((name, ctypes.c_size_t) for name in ("inputs", "outputs", "group")),
    )


class HostLinear(nn.Module):
    """A linear layer on the host whose weight is a view of a slab, in 16 bits or packed."""

    def __init__(self, parts: tuple[torch.Tensor, ...], shape: tuple[int, ...], bits: int, bias: Any) -> None:
        """`parts` are the weight, or its codes, scales and minima; `shape` is (outputs, inputs)."""
        super().__init__()
        self._packed, self._shape, self._bits, self.bias = parts[:-1] and parts, shape, bits, bias
        self.weight = None if self._packed else parts[0]

    @cached_property
    def _matrix(self) -> _Matrix:
        outputs, inputs = self._shape
        parts: tuple[Any, ...] = self._packed or (self.weight, None, None)
        group = inputs * outputs // parts[1].numel() if self._packed else inputs
        addresses = (None if part is None else part.data_ptr() for part in (*parts, self.bias))
        return _Matrix(*addresses, inputs, outputs, group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[:-1].numel()
        if self.weight is not None and rows > MOST_ROWS:
            return linear(x, self.weight, self.bias)
        library, wide = _library(), x.reshape(rows, -1).float()
        if self._bits == 4:
            wide = wide.view(rows, -1, library.lanes(), 2).transpose(2, 3)
        wide, out = wide.contiguous(), x.new_empty(*x.shape[:-1], self._shape[0])
        library.multiply(self._matrix, wide.data_ptr(), out.data_ptr(), rows, self._bits, x.dtype == torch.bfloat16)
        return out


def of_slab(
    slab: torch.Tensor, layout: Layout, place: Place, dtype: torch.dtype, bias: torch.Tensor | None
) -> nn.Module:
    """Return the linear layer of a quantized parameter in a slab on the host."""
    assert layout.format is not None
    return HostLinear(packed_matrix(slab, layout, place, dtype), place.shape, layout.format.bits, bias)


def use(layer: nn.Module, packed: dict[str, Callable[[Any], nn.Module]]) -> None:
    """Replace the linear layers of a module: by those in 16 bits, or by what `packed` makes of a bias for their weights."""
    for path, module in [*layer.named_modules()]:
        if type(module) is not nn.Linear or module.in_features % STEP:
            continue
        make = packed.get(f"{path}.weight") or partial(HostLinear, (module.weight,), tuple(module.weight.shape), 16)
        owner, _, key = path.rpartition(".")
        setattr(layer.get_submodule(owner), key, make(module.bias))


@cache
def _library() -> Any:
    """Return the kernel, compiled if it is not cached. Raises `RuntimeError` when the compiler fails."""
    compiler, runtime = toolchain.c_compiler().found, _openmp()
    command = [compiler, *OPTIONS, str(SOURCE), runtime]
    processor = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    flags = re.findall(r"(?m)^(?:model name|flags|Features)\s*:.*$", processor)
    digest = hashlib.sha256("\n".join([*command, *flags, SOURCE.read_text()]).encode()).hexdigest()
    target = environment.cache_folder() / "host_product" / f"{digest[:16]}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the host's products do not compile: {done.stderr.strip()[:500]}")
        made.replace(target)
    library = ctypes.CDLL(str(target))
    address = ctypes.c_void_p
    library.multiply.argtypes = ctypes.POINTER(_Matrix), address, address, ctypes.c_size_t, ctypes.c_int, ctypes.c_int
    library.multiply.restype = None
    return library


def _openmp() -> str:
    """Return the path of the OpenMP runtime that torch has loaded: its threads are there already."""
    paths = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    return next(path for path in paths if re.match(r"lib(gomp|i?omp)", Path(path).name))
