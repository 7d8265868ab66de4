"""What this machine is, and what it can do at best. It decides nothing."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zi_experiments import environment
from zi_experiments.config import Ceilings, DeviceType, Hardware, conf_dir

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The machine a run is planned for: what was detected, with the user's `hardware` choice laid over it."""

    device: str  # "cuda" or "cpu"
    gpu_name: str | None
    gpus_visible: int
    gpu_memory_bytes: int | None  # of one GPU, after hardware.memory_gib
    gpu_memory_is_capped: bool
    host_memory_bytes: int  # that a run may use
    dtypes: tuple[str, ...]  # 16-bit types, best first
    ceilings: Ceilings
    driver: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gpu:
    name: str
    memory_bytes: int
    dtypes: tuple[str, ...]
    driver: str | None


def detect(hardware: Hardware) -> Machine:
    """The machine behind a `hardware` choice.

    `auto` takes what is there and, for a GPU that has a file in `conf/hardware`, the ceilings of that file.
    """
    gpus = _gpu_count()
    device = hardware.device.value
    if hardware.device is DeviceType.auto:
        device = "cuda" if gpus else "cpu"
    gpu = _first_gpu() if device == "cuda" and gpus else None
    ceilings = hardware.ceilings
    if hardware.name == "auto" and gpu is not None:
        ceilings = _known_ceilings(gpu.name, ceilings) or ceilings
    memory = gpu.memory_bytes if gpu else None
    capped = hardware.memory_gib is not None and (memory is None or hardware.memory_gib * GIB < 0.97 * memory)
    if hardware.memory_gib is not None:
        memory = min(int(hardware.memory_gib * GIB), memory or 1 << 62)
    return Machine(
        device=device,
        gpu_name=gpu.name if gpu else None,
        gpus_visible=gpus,
        gpu_memory_bytes=memory if device == "cuda" else None,
        gpu_memory_is_capped=capped and device == "cuda",
        host_memory_bytes=int(hardware.host_memory_gib * GIB) if hardware.host_memory_gib else host_memory_available(),
        dtypes=tuple(hardware.dtypes or (gpu.dtypes if gpu else _cpu_dtypes())),
        ceilings=ceilings,
        driver=gpu.driver if gpu else None,
    )


def is_gpu(name: str | None, model: str) -> bool:
    """Whether the driver's name of a GPU is of that model: as whole words, since an L40S is no L4."""
    return name is not None and re.search(rf"\b{re.escape(model)}\b", name) is not None


def host_memory_available() -> int:
    """Bytes of host memory that new allocations can have: the kernel's estimate, or the cgroup's limit if lower."""
    import psutil

    available: int = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used))


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def _first_gpu() -> _Gpu:
    import pynvml

    try:
        pynvml.nvmlInit()
        which = environment.first_visible_gpu()
        by_index = isinstance(which, int)
        handle = pynvml.nvmlDeviceGetHandleByIndex(which) if by_index else pynvml.nvmlDeviceGetHandleByUUID(which)
        major, _ = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return _Gpu(
            name=pynvml.nvmlDeviceGetName(handle),
            memory_bytes=pynvml.nvmlDeviceGetMemoryInfo(handle).total,
            dtypes=_gpu_dtypes(major),
            driver=pynvml.nvmlSystemGetDriverVersion(),
        )
    except pynvml.NVMLError:
        return _first_gpu_by_cuda()


def _first_gpu_by_cuda() -> _Gpu:
    """The same where the driver's management library is missing or does not know the device; this creates a context."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return _Gpu(
        name=properties.name,
        memory_bytes=properties.total_memory,
        dtypes=_gpu_dtypes(properties.major),
        driver=None,
    )


def _gpu_dtypes(major: int) -> tuple[str, ...]:
    # bfloat16 arithmetic begins with compute capability 8
    return ("float16", "bfloat16") if major >= 8 else ("float16",)


def _cpu_dtypes() -> tuple[str, ...]:
    import torch

    # the question DeepSpeed's CPU accelerator asks before it accepts float16
    return ("float16", "bfloat16") if torch.ops.mkldnn._is_mkldnn_fp16_supported() else ("bfloat16",)


def _known_ceilings(gpu_name: str, asked: Ceilings) -> Ceilings | None:
    """Those of the file of that GPU; what the user has set counts before."""
    from omegaconf import OmegaConf

    for path in sorted((conf_dir() / "hardware").glob("*.yaml")):
        choice: Any = OmegaConf.load(path)
        if choice.gpu and is_gpu(gpu_name, choice.gpu):
            return Ceilings(**{**choice.ceilings, **{k: v for k, v in vars(asked).items() if v is not None}})
    return None
