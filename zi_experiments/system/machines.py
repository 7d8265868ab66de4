"""Detect this machine: GPUs, memory, 16-bit types, known peak rates. No decisions are made here."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zi_experiments import environment
from zi_experiments.config.schema import Calibration, Ceilings, DeviceType, Hardware, conf_dir
from zi_experiments.system import cores, peers

GIB = 1 << 30
HERE = ("auto", "cpu")  # choices of `hardware` that mean this machine; the files of other choices have their own rates
# of a group and all below it: limit, usage, and the part of the usage that is inactive file cache, which can be freed
_CGROUP_FILES = {
    "cgroup2": ("memory.max", "memory.current", "inactive_file"),
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The machine a run is planned for: detected values, overridden by the user's `hardware` choice."""

    device: str  # "cuda" or "cpu"
    gpu_name: str | None
    gpus_visible: int
    gpu_memory_bytes: int | None  # of one GPU, at most hardware.memory_gib
    gpu_memory_is_capped: bool
    host_memory_bytes: int  # that a run may use
    disk_free_bytes: int | None  # on the disk for weights; None: unknown
    dtypes: tuple[str, ...]  # 16-bit types, best first
    ceilings: Ceilings
    calibration: Calibration | None  # None: not measured
    driver: str | None
    # that each GPU receives from the others of its machine over links of their own; None: one GPU, or PCIe only
    peer_bytes_per_s: float | None = None
    cores: tuple[int, ...] = ()  # of the host that are near the GPU and may be used; (): unknown, on another machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Properties of a GPU that the driver reports, without computing on it."""

    name: str
    memory_bytes: int
    free_bytes: int
    dtypes: tuple[str, ...]
    driver: str | None
    pci_address: str | None


def detect(hardware: Hardware) -> Machine:
    """Return the machine that a `hardware` choice describes.

    `auto` is this machine; for a GPU that has a file in `conf/hardware`, it takes the ceilings of that file. A choice that
    names a GPU which this machine lacks is taken as written: a run can be planned for a machine elsewhere.
    """
    gpus = gpu_count()
    device = hardware.device.value
    if hardware.device is DeviceType.auto:
        device = "cuda" if gpus else "cpu"
    gpu = first_gpu() if device == "cuda" and gpus else None
    ceilings = hardware.ceilings
    if hardware.name == "auto" and gpu is not None:
        ceilings = _known_ceilings(gpu.name, ceilings) or ceilings
    here = gpu if gpu and not is_elsewhere(hardware, gpu.name) else None
    memory = here.memory_bytes if here else None
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
        peer_bytes_per_s=hardware.peer_bytes_per_s or (peers.bytes_per_s(gpus) if here else None),
        cores=cores.near(here.pci_address) if here else (),
    )


def cpu_threads(hardware: Hardware, machine: Machine) -> int:
    """Return how many threads of the host compute layers beside a GPU; one core is left to launch operations."""
    return hardware.cpu_threads or max(1, len(machine.cores) - 1)


def is_elsewhere(hardware: Hardware, gpu_name: str | None) -> bool:
    """Return whether the choice describes a machine other than this one, whose GPU is `gpu_name` (None: no GPU)."""
    return hardware.gpu is not None and not is_gpu(gpu_name, hardware.gpu)


def is_gpu(name: str | None, model: str) -> bool:
    """Return whether a GPU's driver name contains the model as whole words: an L40S is not an L4."""
    return name is not None and re.search(rf"\b{re.escape(model)}\b", name) is not None


def host_memory_available(process: Path = Path("/proc/self")) -> int:
    """Return the bytes of host memory available to new allocations: the kernel's estimate, capped by control groups."""
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_cgroups_leave(process)]))


def _cgroups_leave(process: Path) -> Iterator[int]:
    """Yield the bytes that each control group of a process, and each group above it, may still take (cgroup v1 and v2)."""
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
            # a container may see only its own group, mounted as the root
            inside = group.relative_to(root) if group.is_relative_to(root) else Path()
            for level in (inside, *inside.parents):
                yield from _cgroup_leaves(top / level, *_CGROUP_FILES[kind])


def _cgroup_leaves(folder: Path, limit: str, usage: str, idle: str) -> Iterator[int]:
    try:
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        most, taken = ((folder / name).read_text().strip() for name in (limit, usage))
    except OSError:
        return  # the root has no limit, and v2 may lack its memory controller
    if most != "max":
        yield int(most) - int(taken) + int(statistics[idle])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []  # the kernel has no control groups


def gpu_count() -> int:
    """Return the number of GPUs visible to this process."""
    import torch

    return torch.cuda.device_count()


def first_gpu() -> Gpu:
    """Return the first GPU visible to this process; there must be one. NVML creates no CUDA context."""
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
            pci_address=_text(pynvml.nvmlDeviceGetPciInfo(handle).busId),
        )
    except pynvml.NVMLError:
        return _first_gpu_by_cuda()


def _text(said: str | bytes) -> str:
    return said.decode() if isinstance(said, bytes) else said  # the driver's bindings differ


def _first_gpu_by_cuda() -> Gpu:
    """Return the first GPU where NVML is missing or does not know the device; this creates a CUDA context."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return Gpu(
        name=properties.name,
        memory_bytes=properties.total_memory,
        free_bytes=torch.cuda.mem_get_info(0)[0],
        dtypes=_gpu_dtypes(properties.major),
        driver=None,
        pci_address=None,
    )


def _gpu_dtypes(major: int) -> tuple[str, ...]:
    # bfloat16 arithmetic begins with compute capability 8
    return ("float16", "bfloat16") if major >= 8 else ("float16",)


def cpu_dtypes() -> tuple[str, ...]:
    """Return the 16-bit types that DeepSpeed can compute in on this CPU, best first."""
    import torch

    # the same check as in DeepSpeed's CPU accelerator, before it accepts float16
    return ("float16", "bfloat16") if torch.ops.mkldnn._is_mkldnn_fp16_supported() else ("bfloat16",)


def _known_ceilings(gpu_name: str, typed: Ceilings) -> Ceilings | None:
    """Return the ceilings in the GPU's file, overridden by those the user typed; None if it has no file."""
    from omegaconf import OmegaConf

    for path in sorted((conf_dir() / "hardware").glob("*.yaml")):
        choice: Any = OmegaConf.load(path)
        if choice.gpu and is_gpu(gpu_name, choice.gpu):
            known = choice.ceilings
            return Ceilings(**{k: known.get(k) if v is None else v for k, v in vars(typed).items()})
    return None
