"""Where a record comes from: versions, code, command and machine."""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zi_experiments import environment

PACKAGES = (
    "zi_experiments",
    "torch",
    "deepspeed",
    "transformers",
    "accelerate",
    "hydra-core",
    "omegaconf",
    "wandb",
)
SOURCES = (".py", ".c", ".h")  # C is compiled when a run needs it


def describe(machine: Any) -> dict[str, Any]:
    """Return versions, processor, memory and GPU of this machine, as the record has them."""
    import psutil

    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "code": _code(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": host(),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "host_memory_bytes": psutil.virtual_memory().total,
        "device": machine.device,
        "gpu": machine.gpu_name,
        "gpu_memory_bytes": machine.gpu_memory_bytes,
        "gpus_visible": machine.gpus_visible,
        "driver": machine.driver,
    } | environment.recorded()


def host() -> str:
    """Return the name of this machine."""
    return os.uname().nodename


def code() -> dict[str, Any]:
    """Return what has to be the same on all machines of a run: this code, and the versions that it computes with."""
    return {name: _version(name) for name in ("torch", "deepspeed", "transformers")} | {"code": _code()}


def command() -> str:
    """Return the command line, quoted for a shell."""
    module = Path(sys.argv[0]).name == "__main__.py"
    typed = [each for each in sys.argv[1:] if not each.startswith("--local_rank")]  # which deepspeed's launcher adds
    return shlex.join((["python", "-m", "zi_experiments"] if module else [Path(sys.argv[0]).name]) + typed)


def git_revision() -> str | None:
    """Return the Git revision of this code, with `-dirty` if files are changed; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=folder, capture_output=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() if tracked.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _code() -> str:
    """Return a hash of this package's sources: uncommitted changes do not change the revision."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SOURCES):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
