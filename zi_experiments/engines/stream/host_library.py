"""The host's kernels in C: compiled for this processor when they are first needed, and kept in the user's cache."""

import ctypes
import hashlib
import os
import re
import subprocess
from pathlib import Path

from zi_experiments import environment
from zi_experiments.system import toolchain

OPTIONS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
HEADER = "host_product.h"


def load(name: str) -> ctypes.CDLL:
    """Return the library of a C file in this folder. Raises `RuntimeError` if it cannot be made."""
    compiler, runtime, source = toolchain.c_compiler().found, _openmp(), Path(__file__).with_name(f"{name}.c")
    command = [compiler, *OPTIONS, str(source), runtime]
    processor = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    flags = re.findall(r"(?m)^(?:model name|flags|Features)\s*:.*$", processor)
    code = [file.read_text() for file in (source, source.with_name(HEADER))]
    digest = hashlib.sha256("\n".join([*command, *flags, *code]).encode()).hexdigest()
    target = environment.cache_folder() / "host_product" / f"{digest[:16]}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the host's products do not compile: {done.stderr.strip()[:500]}")
        made.replace(target)
    return ctypes.CDLL(str(target))


def _openmp() -> str:
    """Return the path of the OpenMP runtime that torch has loaded: its threads are there already."""
    paths = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    for path in paths:
        if re.match(r"lib(gomp|i?omp)", Path(path).name):
            return path
    raise RuntimeError("torch has loaded no OpenMP runtime, which the host's products need: pass offload.compute=gpu")
