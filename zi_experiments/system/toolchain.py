"""What this machine has of what a run may need, compilers, headers and limits of the kernel: each fact with its advice.

`preflight` asks for what one plan needs, `doctor` for everything.
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
_IPC_LOCK = 14  # the capability to lock memory without a limit, as a bit of CapEff
_ARCHITECTURE = re.compile(r"\d+\.\d+(\+PTX)?")
_AIO_PROGRAM = "#include <libaio.h>\nint main(void) { return io_queue_init(0, 0); }\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What was found, as a clause, and what to type against it; None: all is well."""

    found: str
    fix: str | None = None


def lacking(need: str, *findings: Finding) -> Iterator[str]:
    """A line for each finding that asks for something: what needs it, what was found, and what to type."""
    for finding in findings:
        if finding.fix is not None:
            yield f"{need}, and {finding.found}: {finding.fix}"


def cxx_compiler() -> Finding:
    """The compiler of DeepSpeed's operators."""
    return _program(environment.program("CXX", "c++")[:1], "apt-get install g++, or set CXX")


def c_compiler() -> Finding:
    """The compiler of Triton's launchers: the one that the user names, else gcc or clang."""
    return _program(environment.program("CC")[:1] or ["gcc", "clang"], "apt-get install gcc, or set CC")


def ninja() -> Finding:
    """The program that compiles torch's extensions, which pip puts beside python."""
    return _program(["ninja"], "pip install ninja")


def python_headers(include: str | None = None) -> Finding:
    """Python.h, in the folder `include` that torch and Triton name to the compiler, or where the user lets it look."""
    include = include or sysconfig.get_path("include", "posix_prefix")
    added = (folder for name in ("CPATH", "CPLUS_INCLUDE_PATH") for folder in environment.path_list(name))
    for folder in (include, *added):
        if (header := Path(folder, "Python.h")).is_file():
            return Finding(found=str(header))
    version = sysconfig.get_python_version()
    return Finding(found=f"{include}/Python.h is not there", fix=f"apt-get install python{version}-dev")


def libaio() -> Finding:
    """Whether a program that uses libaio compiles, which is how DeepSpeed looks for it, with the same compiler."""
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
    """CUDA's compiler, where torch looks for it."""
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
    """TORCH_CUDA_ARCH_LIST in a form that DeepSpeed reads, which makes a number of each part that a dot separates.

    All its CUDA operators (async_io, gds, quantizer) read it, also when they are compiled already. torch alone takes
    9.0a, Hopper and native as well.
    """
    value = environment.cuda_arch_list()
    if value is None:
        return Finding(found="not set: for the GPUs that are visible")
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
    """Whether a process may lock so much memory."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or _may_lock_all_memory():
        return Finding(found="unlimited")
    fix = None if needed_bytes <= limit else "ulimit -l unlimited (a container: docker run --ulimit memlock=-1)"
    return Finding(found=f"the limit is {limit} bytes", fix=fix)


def aio_requests_left() -> int | None:
    """Requests for asynchronous I/O that the kernel has left of those that all processes share; None: it does not say."""
    try:
        return _aio("aio-max-nr") - _aio("aio-nr")
    except OSError:
        return None


def aio_requests(needed: int) -> Finding:
    """Whether the kernel has so many requests for asynchronous I/O left."""
    left = aio_requests_left()
    if left is None:
        return Finding(found="the kernel does not say")
    most = _aio("aio-max-nr")
    fix = None if needed <= left else f"sysctl -w fs.aio-max-nr={max(1 << 20, most - left + needed)}"
    return Finding(found=f"{left} of fs.aio-max-nr={most} are left", fix=fix)


def large_pages() -> Finding:
    """Whether the kernel makes large pages for memory that asks for them, which disks and GPUs fill faster."""
    try:
        choices = Path(LARGE_PAGES).read_text()
    except OSError:
        return Finding(found="none in this kernel", fix="a kernel with CONFIG_TRANSPARENT_HUGEPAGE")
    chosen = choices.partition("[")[2].partition("]")[0]
    fix = f"echo madvise > {LARGE_PAGES}, as root" if chosen == "never" else None
    return Finding(found=f"transparent huge pages: {chosen}", fix=fix)


def writable(folder: Path) -> Finding:
    """Whether files can be made in a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Finding(found=str(folder))
    except OSError as error:
        reason = f"{folder} cannot be written ({error.strerror})"
        return Finding(found=reason, fix="pass offload.path=/a/writable/folder")


def direct_io(folder: Path) -> Finding:
    """Whether files in a folder can be opened with O_DIRECT."""
    with tempfile.NamedTemporaryFile(dir=folder) as probe:
        try:
            os.close(os.open(probe.name, os.O_RDONLY | os.O_DIRECT))
        except OSError as error:
            reason = f"{folder} is on a filesystem without O_DIRECT ({error.strerror})"
            return Finding(found=reason, fix="pass a folder on ext4, xfs or NVMe")
    return Finding(found=str(folder))


def free_space(folder: Path) -> Finding:
    """The room that a folder's disk has; plans say how much they need."""
    return Finding(found=f"{folder} has {gigabytes(shutil.disk_usage(folder).free, 1)} free")


def launcher_variables() -> Finding:
    """Whether a launcher has set all of the variables that torch.distributed reads, or none."""
    present = sorted(environment.distributed_variables())
    if len(present) in (0, 5):
        return Finding(found=", ".join(present) or "none: a run sets its own")
    return Finding(
        found=f"only {', '.join(present)} of RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set",
        fix="set all of them (torchrun does), or none",
    )


def extensions_folder() -> Path:
    """torch's cache of compiled extensions, with a folder for each; it is made if need be."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory("", verbose=False))


def lock_owner(lock: Path) -> int | None:
    """The process that builds an extension under this lock: it keeps the file open. None: there is none.

    Processes of other users are not seen; they have caches of their own.
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
            continue  # it has just been closed
    return None


def _program(names: list[str], fix: str) -> Finding:
    """The first of these programs that is there."""
    paths = [path for name in names if (path := _find(name))]
    return Finding(found=paths[0]) if paths else Finding(found=f"{' or '.join(names)} is not in PATH", fix=fix)


def _find(program: str) -> str | None:
    """Where a worker finds a program."""
    return shutil.which(program, path=environment.worker_environment(cuda=False)["PATH"])


def _aio(name: str) -> int:
    return int(Path("/proc/sys/fs", name).read_text())


def _may_lock_all_memory() -> bool:
    """Whether this process has the capability in the machine's own user namespace: in another it does not count."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    is_outermost = Path("/proc/self/uid_map").read_text().split() == ["0", "0", str((1 << 32) - 1)]
    return is_outermost and bool(int(status["CapEff"], 16) >> _IPC_LOCK & 1)
