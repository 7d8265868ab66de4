"""Check what a run may need of this machine: compilers, headers, kernel limits. Each finding says what to do about it.

`preflight` checks what one plan needs, `doctor` checks everything.
"""

import glob
import os
import re
import resource
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path

from zi_experiments import environment
from zi_experiments.units import gigabytes

LARGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"
_IPC_LOCK = 14  # bit of CapEff: the capability to lock memory without a limit
_ARCHITECTURE = re.compile(r"\d+\.\d+(\+PTX)?")
_AIO_PROGRAM = "#include <libaio.h>\nint main(void) { return io_queue_init(0, 0); }\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of a check."""

    found: str  # a clause
    fix: str | None = None  # what to type; None: nothing to fix


def lacking(need: str, *findings: Finding) -> Iterator[str]:
    """Yield a line for each finding that has a fix: what needs it, what was found, and what to type."""
    for finding in findings:
        if finding.fix is not None:
            yield f"{need}, and {finding.found}: {finding.fix}"


def cxx_compiler() -> Finding:
    """Find the compiler of DeepSpeed's operators."""
    return _program(environment.program("CXX", "c++")[:1], "apt-get install g++, or set CXX")


def c_compiler() -> Finding:
    """Find the compiler of Triton's launchers: `CC` if set, else gcc or clang."""
    return _program(environment.program("CC")[:1] or ["gcc", "clang"], "apt-get install gcc, or set CC")


def ninja() -> Finding:
    """Find ninja, which builds torch's extensions; pip installs it beside python."""
    return _program(["ninja"], "pip install ninja")


def python_headers(include: str | None = None) -> Finding:
    """Find Python.h: in `include`, which torch and Triton pass to the compiler, or in CPATH or CPLUS_INCLUDE_PATH."""
    include = include or sysconfig.get_path("include", "posix_prefix")
    added = (folder for name in ("CPATH", "CPLUS_INCLUDE_PATH") for folder in environment.path_list(name))
    for folder in (include, *added):
        if (header := Path(folder, "Python.h")).is_file():
            return Finding(found=str(header))
    version = sysconfig.get_python_version()
    return Finding(found=f"{include}/Python.h is not there", fix=f"apt-get install python{version}-dev")


def libaio() -> Finding:
    """Check that a program with libaio compiles: DeepSpeed looks for it in this way, with this compiler."""
    fix = "apt-get install gcc libaio-dev (Fedora: dnf install gcc libaio-devel), or set CC"
    compiler, *options = environment.program("CC", sysconfig.get_config_var("CC") or "cc")
    path = _find(compiler)
    if path is None:
        return Finding(found=f"{compiler} is not in PATH", fix=fix)
    flags = [*options, *environment.program("CFLAGS"), *environment.program("LDFLAGS")]
    with tempfile.TemporaryDirectory() as folder:
        command = [path, "-x", "c", "-", "-o", f"{folder}/program", *flags, "-laio"]
        done = subprocess.run(command, input=_AIO_PROGRAM, capture_output=True, text=True)
    if done.returncode == 0:
        return Finding(found="headers and library")
    reason = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
    return Finding(found=f"a program with libaio does not compile ({reason})", fix=fix)


def cuda_toolkit() -> Finding:
    """Find CUDA's compiler, where torch looks for it."""
    from torch.utils import cpp_extension
    from torch.version import cuda

    if cpp_extension.CUDA_HOME is None:
        return Finding(found="there is no CUDA toolkit", fix="install it and set CUDA_HOME")
    compiler = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
    try:
        described = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return Finding(found=f"{compiler} cannot be run", fix="set CUDA_HOME to a CUDA toolkit that has nvcc")
    release = re.search(r"release ([\d.]+)", described)
    return Finding(found=f"{compiler}, CUDA {release[1] if release else 'unknown'}; torch is built for {cuda}")


def cuda_arch_list() -> Finding:
    """Check that DeepSpeed can parse TORCH_CUDA_ARCH_LIST: it converts the parts around each dot to numbers.

    All its CUDA operators (async_io, gds, quantizer) parse it, even when they are compiled already. torch itself also
    accepts 9.0a, Hopper and native.
    """
    value = environment.cuda_arch_list()
    if value is None:
        return Finding(found="not set: the visible GPUs")
    parts = [part.strip() for part in value.replace(" ", ";").split(";") if part.strip()]
    wrong = [part for part in parts if not _ARCHITECTURE.fullmatch(part)]
    found = f"TORCH_CUDA_ARCH_LIST={shlex.quote(value)}"
    if not wrong:
        return Finding(found=found)
    return Finding(
        found=f"{found} has {wrong[0]!r}, which DeepSpeed cannot read",
        fix="unset TORCH_CUDA_ARCH_LIST, or set it to a list such as '9.0' or '8.0;9.0+PTX'",
    )


def locked_memory(needed_bytes: float = inf) -> Finding:
    """Check that a process may lock so much memory."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or _may_lock_all_memory():
        return Finding(found="unlimited")
    fix = None if needed_bytes <= limit else "ulimit -l unlimited (a container: docker run --ulimit memlock=-1)"
    return Finding(found=f"the limit is {limit} bytes", fix=fix)


def aio_requests_left() -> int | None:
    """Return how many asynchronous I/O requests are left of those that all processes share; None if unknown."""
    try:
        return _aio("aio-max-nr") - _aio("aio-nr")
    except OSError:
        return None


def aio_requests(needed: int) -> Finding:
    """Check that the kernel has so many asynchronous I/O requests left."""
    left = aio_requests_left()
    if left is None:
        return Finding(found="the kernel does not say")
    most = _aio("aio-max-nr")
    fix = None if needed <= left else f"sysctl -w fs.aio-max-nr={max(1 << 20, most - left + needed)}"
    return Finding(found=f"{left} of fs.aio-max-nr={most} are left", fix=fix)


def large_pages() -> Finding:
    """Check that the kernel grants transparent huge pages on request: disks and GPUs fill them faster."""
    try:
        choices = Path(LARGE_PAGES).read_text()
    except OSError:
        return Finding(found="none in this kernel", fix="a kernel with CONFIG_TRANSPARENT_HUGEPAGE")
    chosen = choices.partition("[")[2].partition("]")[0]
    fix = f"echo madvise > {LARGE_PAGES}, as root" if chosen == "never" else None
    return Finding(found=f"transparent huge pages: {chosen}", fix=fix)


def writable(folder: Path) -> Finding:
    """Check that files can be created in `folder`, which is created if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Finding(found=str(folder))
    except OSError as error:
        reason = f"{folder} cannot be written ({error.strerror})"
        return Finding(found=reason, fix="pass offload.path=/a/writable/folder")


def direct_io(folder: Path) -> Finding:
    """Check that files in `folder` can be opened with O_DIRECT."""
    with tempfile.NamedTemporaryFile(dir=folder) as probe:
        try:
            os.close(os.open(probe.name, os.O_RDONLY | os.O_DIRECT))
        except OSError as error:
            reason = f"{folder} is on a filesystem without O_DIRECT ({error.strerror})"
            return Finding(found=reason, fix="pass a folder on ext4, xfs or NVMe")
    return Finding(found=str(folder))


def free_space(folder: Path) -> Finding:
    """Report the free space on a folder's disk, without a fix: the plan says how much it needs."""
    return Finding(found=f"{folder} has {gigabytes(shutil.disk_usage(folder).free, 1)} free")


def launcher_variables() -> Finding:
    """Check that all of the variables that torch.distributed reads are set, or none."""
    present = sorted(environment.distributed_variables())
    if len(present) in (0, 5):
        return Finding(found=", ".join(present) or "none: a run sets its own")
    return Finding(
        found=f"only {', '.join(present)} of RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set",
        fix="set all of them (torchrun does), or none",
    )


def extensions_folder() -> Path:
    """Return torch's cache folder of compiled extensions, which has a folder for each; create it if it is missing."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory("", verbose=False))


def lock_owner(lock: Path) -> int | None:
    """Return the id of the process that builds an extension under this lock file, which it keeps open; None if none does.

    Processes of other users cannot be seen; they have their own caches.
    """
    try:
        seen = lock.stat()
    except FileNotFoundError:
        return None
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        try:
            if os.path.samestat(os.stat(link), seen):
                return int(link.split("/")[2])
        except OSError:
            continue  # just closed
    return None


def _program(names: list[str], fix: str) -> Finding:
    """Find the first of these programs that exists."""
    paths = [path for name in names if (path := _find(name))]
    return Finding(found=paths[0]) if paths else Finding(found=f"{' or '.join(names)} is not in PATH", fix=fix)


def _find(program: str) -> str | None:
    """Return the path at which a worker process finds a program, or None."""
    return shutil.which(program, path=environment.worker_environment(cuda=False)["PATH"])


def _aio(name: str) -> int:
    return int(Path("/proc/sys/fs", name).read_text())


def _may_lock_all_memory() -> bool:
    """Return whether this process has CAP_IPC_LOCK in the initial user namespace; elsewhere it has no effect."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    is_outermost = Path("/proc/self/uid_map").read_text().split() == ["0", "0", str((1 << 32) - 1)]
    return is_outermost and bool(int(status["CapEff"], 16) >> _IPC_LOCK & 1)
