"""What this machine is, and what it can do at best. It decides nothing."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zi_experiments import environment
from zi_experiments.config.schema import Calibration, Ceilings, DeviceType, Hardware, conf_dir

GIB = 1 << 30
# limit, usage, and what of the usage is file cache that nobody has needed lately, of a group and all below it
_CGROUP_FILES = {
    "cgroup2": ("memory.max", "memory.current", "inactive_file"),
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The machine a run is planned for: what was detected, with the user's `hardware` choice laid over it."""

    device: str  # "cuda" or "cpu"
    gpu_name: str | None
    gpus_visible: int
    gpu_memory_bytes: int | None  # of one GPU, after hardware.memory_gib
    gpu_memory_is_capped: bool
    host_memory_bytes: int  # that a run may use
    disk_free_bytes: int | None  # where weights would go on disk; None: not looked at
    dtypes: tuple[str, ...]  # 16-bit types, best first
    ceilings: Ceilings
    calibration: Calibration | None  # null: nothing was measured
    driver: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """What is known of a GPU without computing on it."""

    name: str
    memory_bytes: int
    free_bytes: int
    dtypes: tuple[str, ...]
    driver: str | None


def detect(hardware: Hardware) -> Machine:
    """The machine behind a `hardware` choice.

    `auto` takes what is there and, for a GPU that has a file in `conf/hardware`, the ceilings of that file. A choice that
    names a GPU which is not there is taken at its word.
    """
    gpus = gpu_count()
    device = hardware.device.value
    if hardware.device is DeviceType.auto:
        device = "cuda" if gpus else "cpu"
    gpu = first_gpu() if device == "cuda" and gpus else None
    ceilings = hardware.ceilings
    if hardware.name == "auto" and gpu is not None:
        ceilings = _known_ceilings(gpu.name, ceilings) or ceilings
    memory = gpu.memory_bytes if gpu and not is_elsewhere(hardware, gpu.name) else None
    capped = hardware.memory_gib is not None and memory is not None and hardware.memory_gib * GIB < 0.97 * memory
    if hardware.memory_gib is not None:
        memory = min(int(hardware.memory_gib * GIB), memory or 1 << 62)
    return Machine(
        device=device,
        gpu_name=gpu.name if gpu else None,
        gpus_visible=gpus,
        gpu_memory_bytes=memory if device == "cuda" else None,
        gpu_memory_is_capped=capped and device == "cuda",
        host_memory_bytes=int(hardware.host_memory_gib * GIB) if hardware.host_memory_gib else host_memory_available(),
        disk_free_bytes=None,
        dtypes=tuple(hardware.dtypes or (gpu.dtypes if gpu else cpu_dtypes())),
        ceilings=ceilings,
        calibration=hardware.calibration,
        driver=gpu.driver if gpu else None,
    )


def is_elsewhere(hardware: Hardware, gpu_name: str | None) -> bool:
    """Whether a choice is another machine than the one with that GPU, or without any."""
    return hardware.gpu is not None and not is_gpu(gpu_name, hardware.gpu)


def is_gpu(name: str | None, model: str) -> bool:
    """Whether the driver's name of a GPU is of that model: as whole words, since an L40S is no L4."""
    return name is not None and re.search(rf"\b{re.escape(model)}\b", name) is not None


def host_memory_available(process: Path = Path("/proc/self")) -> int:
    """Bytes of host memory that new allocations can have: the kernel's estimate, or what control groups leave if less."""
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_cgroups_leave(process)]))


def _cgroups_leave(process: Path) -> Iterator[int]:
    """What each control group that a process is in may still take, and each one above it, of both versions."""
    groups: dict[str, Path] = {}
    for line in _lines(process / "cgroup"):
        _, controllers, path = line.split(":", 2)
        groups |= {controller: Path(path) for controller in controllers.split(",")}
    for line in _lines(process / "mountinfo"):
        mount, _, filesystem = line.partition(" - ")
        kind, _, options = filesystem.split(" ", 2)
        controller = "" if kind == "cgroup2" else "memory"  # version 2 names no controllers
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            root, top = map(Path, mount.split()[3:5])
            group = groups.get(controller, root)
            # a container may see nothing but its own group, and that at the top
            inside = group.relative_to(root) if group.is_relative_to(root) else Path()
            for level in (inside, *inside.parents):
                yield from _cgroup_leaves(top / level, *_CGROUP_FILES[kind])


def _cgroup_leaves(folder: Path, limit: str, usage: str, idle: str) -> Iterator[int]:
    try:
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        most, taken = ((folder / name).read_text().strip() for name in (limit, usage))
    except OSError:
        return  # the root has no limit, and version 2 may be there without its memory controller
    if most != "max":
        yield int(most) - int(taken) + int(statistics[idle])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []  # a kernel without control groups


def gpu_count() -> int:
    """How many GPUs CUDA shows this process."""
    import torch

    return torch.cuda.device_count()


def first_gpu() -> Gpu:
    """The first of the GPUs that CUDA shows this process; there must be one."""
    import pynvml

    try:
        pynvml.nvmlInit()
        which = environment.first_visible_gpu()
        by_index = isinstance(which, int)
        handle = pynvml.nvmlDeviceGetHandleByIndex(which) if by_index else pynvml.nvmlDeviceGetHandleByUUID(which)
        major, _ = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return Gpu(
            name=pynvml.nvmlDeviceGetName(handle),
            memory_bytes=memory.total,
            free_bytes=memory.free,
            dtypes=_gpu_dtypes(major),
            driver=pynvml.nvmlSystemGetDriverVersion(),
        )
    except pynvml.NVMLError:
        return _first_gpu_by_cuda()


def _first_gpu_by_cuda() -> Gpu:
    """The same where the driver's management library is missing or does not know the device; this creates a context."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return Gpu(
        name=properties.name,
        memory_bytes=properties.total_memory,
        free_bytes=torch.cuda.mem_get_info(0)[0],
        dtypes=_gpu_dtypes(properties.major),
        driver=None,
    )


def _gpu_dtypes(major: int) -> tuple[str, ...]:
    # bfloat16 arithmetic begins with compute capability 8
    return ("float16", "bfloat16") if major >= 8 else ("float16",)


def cpu_dtypes() -> tuple[str, ...]:
    """16-bit types that DeepSpeed computes on this processor, best first."""
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
