"""Checks that turn an obscure failure into one clear error before anything is loaded. They fix nothing."""

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from zi_experiments import environment, quality
from zi_experiments.config import ConfigError, OffloadDevice, Run
from zi_experiments.hardware import is_gpu
from zi_experiments.plan import Plan


def scratch_folder(run: Run, default: Path, name: str) -> Path | None:
    """The folder of its own, not yet made, in which a run puts weights on disk: below `offload.path`, or `default`."""
    if run.offload.device is not OffloadDevice.nvme:
        return None
    base = Path(run.offload.path).expanduser().resolve() if run.offload.path else default
    return base / f"zi-{name}"


def check(plan: Plan, scratch: Path | None) -> None:
    """Refuse what cannot work on this machine. `scratch` is the folder that NVMe offload will use.

    Raises `ConfigError` with what is wrong and what to type.
    """
    for problem in _problems(plan, scratch):
        raise ConfigError(problem)
    if plan.run.workload.text is not None:
        quality.windows(plan)


def _problems(plan: Plan, scratch: Path | None) -> Iterator[str]:
    yield from _devices(plan)
    yield from _compiler(plan)
    if scratch is not None:
        yield from _disk(plan, scratch)


def _devices(plan: Plan) -> Iterator[str]:
    hardware, machine = plan.run.hardware, plan.machine
    if machine.device == "cpu":
        return
    if machine.gpus_visible == 0:
        yield f"hardware={hardware.name} needs a CUDA GPU and none is visible: pass hardware=auto, or plan_only=true"
    if hardware.num_gpus > machine.gpus_visible:
        yield (
            f"hardware.num_gpus={hardware.num_gpus} and {machine.gpus_visible} are visible: "
            f"pass hardware.num_gpus={machine.gpus_visible}"
        )
    if hardware.gpu and not is_gpu(machine.gpu_name, hardware.gpu):
        yield (
            f"hardware={hardware.name} and this machine has {machine.gpu_name}: pass hardware=auto, "
            f"or hardware=auto hardware.memory_gib={hardware.memory_gib} to study a smaller card"
        )


def _compiler(plan: Plan) -> Iterator[str]:
    """What is compiled on first use."""
    if plan.run.engine.name != "deepspeed":
        if (
            plan.machine.device == "cuda"
            and plan.run.quant.bits < 16
            and not any(map(shutil.which, ("cc", "gcc", "clang")))
        ):
            yield "Triton compiles the kernel that expands quantized weights and there is no C compiler: apt-get install gcc"
        return
    if shutil.which("c++") is None and shutil.which("g++") is None:
        yield "DeepSpeed compiles operators and there is no C++ compiler: apt-get install g++"
    if plan.run.offload.device is OffloadDevice.nvme and not _has_libaio():
        yield "offload=nvme needs libaio's headers: apt-get install libaio-dev (Fedora: dnf install libaio-devel)"
    if plan.uses_cuda_quantizer and not _has_cuda_toolkit():
        yield (
            "quantized float16 weights are expanded by a CUDA kernel that DeepSpeed compiles, and there is no CUDA toolkit: "
            "install it and set CUDA_HOME, or pass quant=fp16"
        )


def _has_cuda_toolkit() -> bool:
    from torch.utils import cpp_extension

    return cpp_extension.CUDA_HOME is not None


def _has_libaio() -> bool:
    roots = [Path("/usr/include"), Path("/usr/local/include")]
    roots += [Path(part) for name in ("CPATH", "CPLUS_INCLUDE_PATH") for part in environment.path_list(name)]
    return any((root / "libaio.h").is_file() for root in roots)


def _disk(plan: Plan, scratch: Path) -> Iterator[str]:
    base = scratch.parent
    try:
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=base) as probe:
            refused = _direct_io_error(probe.name)
    except OSError as error:
        yield f"offload.path={base} cannot be written ({error.strerror}): pass offload.path=/a/writable/folder"
        return
    if refused:
        yield f"offload.path={base} is on a filesystem without O_DIRECT ({refused}): pass a folder on ext4, xfs or NVMe"
    needed, free = plan.placement.nvme_bytes, shutil.disk_usage(base).free
    if needed > free:
        yield (
            f"offload.path={base} has {free / 1e9:.1f} GB free and {plan.run.model.name} needs {needed / 1e9:.1f} GB there: "
            "pass offload.path=/a/larger/disk" + ("" if plan.run.quant.bits == 4 else " or quant=int4")
        )
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    buffers = plan.storage.locked_bytes
    if os.geteuid() != 0 and locked not in (resource.RLIM_INFINITY, -1) and locked < buffers:
        yield f"offload=nvme locks {buffers / 1e9:.1f} GB of memory and the limit is {locked} bytes: ulimit -l unlimited"


def _direct_io_error(path: str) -> str | None:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        return error.strerror
    return None
