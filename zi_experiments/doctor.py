"""`python -m zi_experiments.doctor`: check that this machine has what runs need, and say how to get what is missing."""

import argparse
import logging
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from zi_experiments import environment, lines
from zi_experiments.runtime import caches, stdio
from zi_experiments.system import toolchain
from zi_experiments.system.disk import folder_problem
from zi_experiments.system.toolchain import Finding
from zi_experiments.units import gigabytes

AIO_OF_A_RANK = 1152  # what engine=deepspeed offload=nvme takes by default
_SHARED_BYTES = 1 << 30  # Docker gives 64 MiB, where the back ends of several ranks fail or end with SIGBUS
_MOSTLY_FREE = 0.9
_WIDTHS = (10, 20)  # of state and name
_STYLES = {"ok": "green", "missing": "bold red", "optional": "yellow"}

# name, function, and what needs it; None: runs with default settings need it
Check = tuple[str, Callable[[], Finding], str | None]


def main() -> int:
    """Print a line for each check, and how to fix what is not ok.

    Return 1 if something is missing that runs with default settings need, else 0.

    A `--path` that is not a folder ends the process with a line that says so.
    """
    stdio.install()
    parser = argparse.ArgumentParser(prog="python -m zi_experiments.doctor", description="Check this machine.")
    parser.add_argument(
        "--path", type=Path, nargs="+", default=[Path()], help="folders for offload=nvme; default: the current one"
    )
    parser.add_argument("--compile", action="store_true", help="compile DeepSpeed's operators, as first runs do")
    arguments = parser.parse_args()
    folders = [folder.expanduser().resolve() for folder in arguments.path]
    for folder in folders:
        if problem := folder_problem("--path ", folder):
            sys.exit(lines.fit(f"refused: {problem}", sys.stderr))
    # torch warns about the same problems that the table shows
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    console, states = Console(), set()
    for name, check, needed_by in checks(*folders):
        finding = _finding(check)
        state = "ok" if finding.fix is None else "missing" if needed_by is None else "optional"
        head = f"{state:<{_WIDTHS[0]}}{name:<{_WIDTHS[1]}}"
        lines.say(finding.found, console, head=head, style=_STYLES[state], indent=len(head))
        if finding.fix is not None:
            fix = ": ".join(part for part in (needed_by, finding.fix) if part)
            lines.say(f"{'':<{len(head)}}→ {fix}", console, indent=len(head) + 2)
        states.add(state)
    if arguments.compile and "missing" not in states:
        compile_operators()
    return 1 if "missing" in states else 0


def compile_operators() -> None:
    """Compile DeepSpeed's operators into torch's extensions cache, and say what is compiled."""
    device = "cuda" if _gpus() else "cpu"
    environment.set_variables(environment.worker_environment(cuda=device == "cuda"))
    from zi_experiments.engines.deepspeed import operators
    from zi_experiments.runtime import progress

    operators.build(operators.usual(device), progress.shown(Console()))


def checks(*folders: Path) -> list[Check]:
    """Return all checks; `folders` are where offload=nvme would put the weights."""
    nvme, own_nvme = "for offload=nvme", "for offload=nvme engine=deepspeed"
    gpus = _gpus()
    return [
        ("caches", kept, None),  # first, since other packages use them
        ("Python", python, None),
        *((name, partial(package, name), None) for name in ("torch", "transformers", "deepspeed")),
        ("other packages", other_packages, None),
        ("GPU", gpu, "for hardware=auto to use one"),
        *([("GPU memory", gpu_memory, "for all of it")] if gpus else []),
        ("host memory", host_memory, None),
        ("large pages", toolchain.large_pages, "for disks and GPUs to fill memory faster"),
        ("C++ compiler", toolchain.cxx_compiler, None),
        ("Python.h", toolchain.python_headers, None),
        ("ninja", toolchain.ninja, None),
        *([("CUDA toolkit", toolchain.cuda_toolkit, None)] if gpus else []),
        ("CUDA architectures", toolchain.cuda_arch_list, None if gpus else "for a GPU"),
        ("C compiler", toolchain.c_compiler, "for engine=stream with quantized weights on a GPU"),
        ("libaio", toolchain.libaio, own_nvme),
        ("asynchronous I/O", partial(toolchain.aio_requests, AIO_OF_A_RANK), own_nvme),
        ("locked memory", toolchain.locked_memory, own_nvme),
        *(
            (name, partial(look, folder), nvme)
            for folder in folders
            for name, look in (
                ("offload folder", toolchain.writable),
                ("O_DIRECT", toolchain.direct_io),
                ("free space", toolchain.free_space),
            )
        ),
        ("output folder", output_folder, None),
        ("builds", builds, None),
        ("shared memory", shared_memory, "for hardware.num_gpus above 1"),
        ("launcher", toolchain.launcher_variables, "for get_ds_model"),
        ("W&B", wandb, "for runs to be seen online"),
    ]


def python() -> Finding:
    """Check this Python against the versions that the project supports."""
    from packaging.specifiers import SpecifierSet

    wanted = metadata.metadata("zi_experiments")["Requires-Python"]
    fix = None if SpecifierSet(wanted).contains(platform.python_version()) else f"install Python {wanted}"
    return Finding(found=f"{platform.python_version()}, {sys.executable}", fix=fix)


def package(name: str) -> Finding:
    """Check the version of a package, and import it in a separate process."""
    finding = _version(name)
    if finding.fix is not None:
        return finding
    command = [sys.executable, "-c", f"import {name}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return finding
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Finding(found=f"{finding.found} cannot be imported ({reason})", fix=f"pip install --force-reinstall {name}")


def other_packages() -> Finding:
    """Check the other packages that the project needs; return the first problem."""
    others = [name for name in _requirements() if name not in ("torch", "transformers", "deepspeed")]
    for name in others:
        finding = _version(name)
        if finding.fix is not None:
            return replace(finding, found=f"{name}: {finding.found}")
    return Finding(found=", ".join(f"{name} {metadata.version(name)}" for name in others))


def gpu() -> Finding:
    """Return the first GPU, its driver and what torch is built for, or why there is none."""
    import torch
    from torch.version import cuda

    from zi_experiments.system import machines

    build = f"torch is built for CUDA {cuda}" if cuda else "torch is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        fix = "look at nvidia-smi and CUDA_VISIBLE_DEVICES" if cuda else "install torch for CUDA, from pytorch.org"
        return Finding(found=f"none: {build} ({str(error).splitlines()[0]})", fix=fix)
    first = machines.first_gpu()
    return Finding(found=f"{machines.gpu_count()} × {first.name}, driver {first.driver}; {build}")


def gpu_memory() -> Finding:
    """Return the free memory of the first GPU."""
    from zi_experiments.system import machines

    first = machines.first_gpu()
    fix = None if first.free_bytes > _MOSTLY_FREE * first.memory_bytes else "nvidia-smi shows who uses the rest"
    return Finding(found=f"{gigabytes(first.free_bytes, 1)} of {gigabytes(first.memory_bytes, 1)} free", fix=fix)


def host_memory() -> Finding:
    """Return the host memory that new allocations can have."""
    from zi_experiments.system import machines

    return Finding(found=f"{gigabytes(machines.host_memory_available(), 1)} available")


def output_folder() -> Finding:
    """Check the folder from which runs are started: they make `outputs/` there."""
    return _with_fix(toolchain.writable(Path.cwd()), "start runs elsewhere, or pass hydra.run.dir=/a/writable/folder")


def kept() -> Finding:
    """Check the folders that keep compiled operators and other results for later runs."""
    try:
        moved = caches.settle()
        folders = (toolchain.extensions_folder(), environment.cache_folder())
    except (ValueError, OSError) as error:
        finding = Finding(found=str(error), fix="")
    else:
        findings = [toolchain.writable(folder) for folder in folders]
        finding = next((one for one in findings if one.fix is not None), Finding(found=moved or str(folders[0])))
    return _with_fix(finding, "set HOME to a folder that can be written, or TORCH_EXTENSIONS_DIR and XDG_CACHE_HOME")


def builds() -> Finding:
    """Return the locks of operators in torch's cache. Runs wait for locks that a process holds, and remove others."""
    notes = []
    for lock in sorted(toolchain.extensions_folder().glob("*/lock")):
        owner = toolchain.lock_owner(lock)
        note = f"process {owner} builds it" if owner else "the lock of an interrupted build, which a run removes"
        notes.append(f"{lock.parent.name}: {note}")
    return Finding(found="; ".join(notes) or "none under way")


def shared_memory() -> Finding:
    """Check /dev/shm, through which the ranks of one machine communicate."""
    free = shutil.disk_usage("/dev/shm").free
    fix = None if free >= _SHARED_BYTES else "docker run --shm-size=8g, or mount -o remount,size=8G /dev/shm"
    return Finding(found=f"/dev/shm has {gigabytes(free, 1)} free", fix=fix)


def wandb() -> Finding:
    """Return what tracking=wandb means here: the W&B mode."""
    mode = environment.wandb_mode()
    if mode is None:
        environment.prepare_for_wandb("auto")
        from zi_experiments.results.sinks.wandb import login_mode

        mode = login_mode()
    return Finding(found=mode, fix="wandb login, or set WANDB_API_KEY" if mode == "offline" else None)


def _finding(check: Callable[[], Finding]) -> Finding:
    """Return what a check found. A failed check must not end the table: torch or a kernel file may be missing."""
    try:
        return check()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        return Finding(found=f"{type(error).__name__}: {reason}", fix="make install, or pip install -e .")


def _gpus() -> int:
    try:
        from zi_experiments.system import machines

        return machines.gpu_count()
    except Exception:
        return 0  # the checks of torch say what is wrong with it


def _requirements() -> dict[str, Any]:
    """Return the packages that the project needs, by name, as packaging's `Requirement`."""
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in metadata.requires("zi_experiments") or []]
    return {one.name: one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})}


def _version(name: str) -> Finding:
    wanted = _requirements()[name]
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(found="not installed", fix=f"pip install '{wanted}'")
    is_wanted = wanted.specifier.contains(version, prereleases=True)
    return Finding(found=version, fix=None if is_wanted else f"pip install '{wanted}'")


def _with_fix(finding: Finding, fix: str) -> Finding:
    return finding if finding.fix is None else replace(finding, fix=fix)


if __name__ == "__main__":
    sys.exit(main())
