"""Failures of workers: the status of the run, what happened, and what to type instead."""

import re
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zi_experiments.config.schema import CacheDevice, ConfigError, OffloadDevice
from zi_experiments.cost_model.plan import Plan
from zi_experiments.results.record import Failure, Status
from zi_experiments.runtime.distributed import Place
from zi_experiments.runtime.progress import Event

_ENTRY_POINT = re.compile(r"worker\.py\", line \d+ in main$")  # as faulthandler writes it


class WorkerError(Exception):
    """The workers did not finish: status and failure of the first one that ended."""

    def __init__(self, status: Status, failure: Failure) -> None:
        super().__init__(failure.message)
        self.status = status
        self.failure = failure


def when(last: Event | None) -> str:
    """Return the phase in which the workers last reported, as text."""
    if last is None:
        return "at the start"
    return f"{'after' if last.ended else 'during'} {last.phase}"


def of_silence(timeout_s: float, when: str, logs: Path) -> WorkerError:
    """Return the error for workers without a sign of progress for `timeout_s`."""
    message = f"no sign of progress for {timeout_s:g} s {when}: the run was stopped"
    hint = f"if it only takes longer, pass a larger launch.timeout_s; the logs say what it was doing: {logs}"
    return WorkerError("killed", Failure(type="Timeout", message=message, hint=hint, traceback=_log_tail(logs, 0)))


def of_worker(
    error: Any, plan: Plan, when: str, oom_killed: bool, logs: Path, place: Place | None = None
) -> WorkerError:
    """Return the error of the first failed worker, from its own report or from the kernel's signal.

    `place` is that of the workers where there are several launchers.
    """
    worker, first = error.get_first_failure()
    rank = f"{place.first + worker} on {place.host}" if place else f"{worker}"
    where = f"the logs are in {logs}" + (f" on {place.host}" if place else "")
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        if oom_killed and name == "SIGKILL":
            message = f"rank {rank} was killed by the kernel {when}: the host ran out of memory"
            hint = f"{_less_host_memory(plan)}; {where}"
            return WorkerError("oom", Failure(type="OutOfMemory", message=message, hint=hint))
        message = f"rank {rank} was ended by {name} {when}"
        status: Status = "killed" if name in ("SIGKILL", "SIGTERM", "SIGINT") else "error"
        return WorkerError(status, Failure(type=name, message=message, hint=where, traceback=_log_tail(logs, worker)))
    data = first.error_file_data.get("message", {})
    text = data.get("message", first.message) if isinstance(data, dict) else str(data)
    trace = data.get("extraInfo", {}).get("py_callstack") if isinstance(data, dict) else None
    kind, _, message = text.partition(": ")
    if kind == ConfigError.__name__:
        return WorkerError("refused", Failure(type=kind, message=message))
    trace = trace or _log_tail(logs, worker)
    if short := _out_of_memory(kind, text, plan):
        what, hint = short
        return WorkerError(
            "oom", Failure(type=kind, message=f"{what} (rank {rank}, {when})", hint=hint, traceback=trace)
        )
    message = f"{message.strip() or kind} (rank {rank}, {when})"
    return WorkerError("error", Failure(type=kind, message=message, hint=where, traceback=trace))


def oom_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory since boot."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def _out_of_memory(kind: str, text: str, plan: Plan) -> tuple[str, str] | None:
    """Return which memory ran out and what to pass; None if the error is of another kind."""
    if kind in ("OutOfMemoryError", "AcceleratorError") and "out of memory" in text:
        return "the GPU ran out of memory", _less_gpu_memory(plan)
    if kind == "MemoryError" or "can't allocate memory" in text or "out of memory" in text:
        return "the host ran out of memory", _less_host_memory(plan)
    return None


def _less_gpu_memory(plan: Plan) -> str:
    run = plan.run
    offloaded = run.offload.device is not OffloadDevice.none
    resident = plan.placement.gpu_bytes / plan.weight_bytes
    return _pass(
        {
            "offload=cpu": not offloaded,
            f"offload.resident={resident / 2:.1g}": offloaded and run.offload.resident != 0,
            "kv_cache=cpu": run.kv_cache.device is CacheDevice.gpu,
            "quant=int4": run.quant.bits == 16,
            "a smaller workload.batch_size": True,
        }
    )


def _less_host_memory(plan: Plan) -> str:
    run = plan.run
    return _pass(
        {
            "offload=nvme": run.offload.device is not OffloadDevice.nvme,
            "quant=int4": run.quant.bits == 16,
            "offload.pin_memory=false": plan.pin_memory,
            "a smaller hardware.host_memory_gib": True,  # the next run is then refused, or planned for less
        }
    )


def _pass(fixes: dict[str, bool]) -> str:
    """Return the fixes that change anything, as text."""
    *most, last = [fix for fix, helps in fixes.items() if helps]
    return f"pass {', '.join(most)} or {last}" if most else f"pass {last}"


def _log_tail(logs: Path, rank: int, lines: int = 40) -> str | None:
    for path in sorted(logs.glob(f"*/attempt_0/{rank}/stderr.log"), reverse=True):  # the latest try first
        return "\n".join(list(_without_callers(path.read_text(errors="replace").splitlines()))[-lines:])
    return None


def _without_callers(lines: list[str]) -> Iterator[str]:
    """Yield lines of a log; of stacks only what a worker called: it is forked, so those of the launcher lie below."""
    is_caller = False
    for line in lines:
        is_caller = is_caller and line.startswith("  File ")
        if not is_caller:
            yield line
        is_caller = is_caller or _ENTRY_POINT.search(line) is not None


def explain(error: Exception) -> tuple[Status, Failure]:
    """Return the status of a run that ended with this error, and the reason as the record has it."""
    if isinstance(error, ConfigError):
        return "refused", Failure(type="ConfigError", message=str(error))
    if isinstance(error, WorkerError):
        return error.status, error.failure
    trace = "".join(traceback.format_exception(error))
    return "error", Failure(type=type(error).__name__, message=str(error), traceback=trace)
