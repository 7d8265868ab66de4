"""Environment variables: the only module that reads them."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


def recorded() -> dict[str, str | None]:
    """Return the variables that a record has, by its keys."""
    return {name.lower(): os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "TORCH_EXTENSIONS_DIR")}


def first_visible_gpu() -> str | int:
    """Return the first GPU that CUDA shows this process: an index, or a UUID if CUDA_VISIBLE_DEVICES has one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return int(visible) if visible.isdigit() else (visible or 0)


def visible_gpus(count: int) -> list[str]:
    """Return the name of each visible GPU as CUDA_VISIBLE_DEVICES has it; indices where it is not set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [each.strip() for each in named.split(",")][:count] if named else [str(index) for index in range(count)]


def worker_environment(cuda: bool) -> dict[str, str]:
    """Return variables that a worker needs: PATH with this Python's programs, and defaults for those that are not set."""
    wanted = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if not cuda:
        wanted["DS_ACCELERATOR"] = "cpu"
    elif "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # KV cache, verification and activations differ in size: what one leaves free fits the next
        wanted["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    unset = {name: value for name, value in wanted.items() if name not in os.environ}
    # torch looks for the ninja program, which pip puts beside python, also when the environment is not activated
    return unset | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])}


def distributed_variables() -> dict[str, str]:
    """Return the variables of a launcher that are set, of those that torch.distributed reads."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: os.environ[name] for name in names if name in os.environ}


@dataclass(frozen=True, kw_only=True, slots=True)
class Launched:
    """What torchrun, deepspeed, srun or mpirun tells a process of those that it has started of one command."""

    number: int
    processes: int
    local_number: int  # among those on this machine
    machines: int
    endpoint: str | None  # HOST:PORT where they meet; None: the launcher names none
    has_store: bool  # torchrun itself listens there
    attempt: str  # torchrun starts all of them again when one fails


_LAUNCHERS = (  # variables with: number, processes, number on this machine, processes on this machine
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ()),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",)),
)


def launched() -> Launched | None:
    """Return what a launcher tells this process; None without one, or if this is the only process it has started."""
    for number, processes, local_number, local_processes in _LAUNCHERS:
        if number == "RANK" and len(distributed_variables()) < 5:
            continue  # a shell may have kept some of them
        # a shell in an allocation of Slurm's has variables too, and a step of one task
        if not {number, processes, local_number} <= os.environ.keys() or int(os.environ[processes]) < 2:
            continue
        here = next(
            (int(os.environ[name]) for name in local_processes if name in os.environ), int(os.environ[processes])
        )
        machines = -(-int(os.environ[processes]) // here)
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        return Launched(
            number=int(os.environ[number]),
            processes=int(os.environ[processes]),
            local_number=int(os.environ[local_number]),
            machines=int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) if number == "SLURM_PROCID" else machines,
            endpoint=f"{address}:{port}" if address and port else None,
            has_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )
    return None


def forget_launcher() -> None:
    """Unset what a launcher says of this process, which is not so of the processes that this one starts."""
    for name in [*distributed_variables(), "LOCAL_WORLD_SIZE", "LOCAL_SIZE"]:
        os.environ.pop(name, None)
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]


def set_variables(values: dict[str, str]) -> None:
    """Set variables of this process."""
    os.environ.update(values)


def sweep() -> Path | None:
    """Return the folder that a `-m` command shares with its jobs in all processes; None outside a sweep."""
    return folder("ZI_SWEEP")


def runs_a_job_elsewhere() -> bool:
    """Return whether this process runs jobs of a `-m` command that is another process."""
    return "ZI_SWEEP" in os.environ and os.environ["ZI_SWEEP_PID"] != str(os.getpid())


def sweep_variables() -> dict[str, str]:
    """Return what `set_sweep` has set, for a job that does not inherit it."""
    return {name: os.environ[name] for name in ("ZI_SWEEP", "ZI_SWEEP_PID") if name in os.environ}


def is_job_of_slurm() -> bool:
    """Return whether this process runs a job that submitit has put into a queue of Slurm's."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def set_sweep(folder: Path) -> None:
    """Note that this process is a `-m` command with that folder, for processes that it starts too."""
    os.environ |= {"ZI_SWEEP": str(folder), "ZI_SWEEP_PID": str(os.getpid())}


@contextmanager
def variables(values: dict[str, str]) -> Iterator[dict[str, str]]:
    """Set variables for a while, for processes that are started in it; yield all variables of the process."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield dict(os.environ)
    finally:
        os.environ.clear()
        os.environ.update(before)


def program(variable: str, default: str = "") -> list[str]:
    """Return a variable such as CC or CFLAGS, or its default, split into words as a shell does."""
    return shlex.split(os.environ.get(variable) or default)


def cuda_arch_list() -> str | None:
    """Return TORCH_CUDA_ARCH_LIST; None if it is not set or blank."""
    return variable("TORCH_CUDA_ARCH_LIST")


def path_list(variable: str) -> list[str]:
    """Return the folders in a variable such as CPATH."""
    return [part for part in os.environ.get(variable, "").split(os.pathsep) if part]


def folder(variable: str) -> Path | None:
    """Return the folder that a variable names; None if it is not set or empty."""
    return Path(value) if (value := os.environ.get(variable)) else None


def home() -> Path | None:
    """Return the user's home; None if it does not exist, as in containers without an entry for the user."""
    try:
        found = Path.home()
    except RuntimeError:
        return None
    return found if os.path.isdir(found) else None


def cache_folder() -> Path:
    """Return the folder for caches of this project, which may not exist yet: below XDG_CACHE_HOME or `~/.cache`."""
    return (folder("XDG_CACHE_HOME") or Path.home() / ".cache") / "zi_experiments"


def forget_no_width() -> None:
    """Drop a COLUMNS of 0, which some terminals set: rich would print nothing."""
    if os.environ.get("COLUMNS") == "0":
        del os.environ["COLUMNS"]


def variable(name: str) -> str | None:
    """Return the value of a variable; None if it is not set or blank."""
    return os.environ.get(name, "").strip() or None


def forget(name: str) -> str | None:
    """Unset a variable. Return its value before; None if it was not set or blank."""
    said = variable(name)
    os.environ.pop(name, None)
    return said


def wandb_mode() -> str | None:
    """Return WANDB_MODE, by the names of `tracking.mode`; None if it is not set."""
    mode = (variable("WANDB_MODE") or "").lower()
    return {"run": "online", "dryrun": "offline"}.get(mode, mode) or None


def prepare_for_wandb(mode: str) -> None:
    """Set the variables that `wandb` reads when it is imported, for a run of that mode.

    Its telemetry is off unless the user has set it: without a network it delays the end of the process.
    """
    for name in [name for name in os.environ if name.startswith("WANDB_") and variable(name) is None]:
        forget(name)
    if wandb_mode() == mode:
        os.environ["WANDB_MODE"] = mode
    else:
        forget("WANDB_MODE")  # another was typed
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
