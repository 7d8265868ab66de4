"""Start the worker processes, wait, and say what became of them."""

import logging
import multiprocessing
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from zi_experiments import environment
from zi_experiments.plan import Plan
from zi_experiments.progress import Display, Event
from zi_experiments.record import Failure, Status

if TYPE_CHECKING:
    from zi_experiments.worker import Measurement  # it imports torch


class WorkerError(Exception):
    """The workers did not finish: the status and failure of the first that ended."""

    def __init__(self, status: Status, failure: Failure) -> None:
        super().__init__(failure.message)
        self.status = status
        self.failure = failure


class Interrupted(KeyboardInterrupt):
    """The launcher was told to stop, by Ctrl-C or a signal; the workers are gone."""


def launch(plan: Plan, config: dict[str, Any], logs: Path, console: Console) -> "Measurement":
    """Run the workers of a plan, one process per GPU, and return what rank 0 measured, with the largest GPU peak.

    Their output goes to files under `logs`. Raises `WorkerError` when one fails or is killed, `Interrupted` when
    this process is told to stop.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from zi_experiments import worker

    # it reports each failure with its own traceback, which the record has too
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logs.mkdir(parents=True, exist_ok=True)
    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=plan.run.hardware.num_gpus,
        run_id=uuid.uuid4().hex[:8],
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",  # a free port
        local_addr="127.0.0.1",
        max_restarts=0,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )
    reader, writer = multiprocessing.get_context("spawn").Pipe(duplex=False)
    kills_before = _oom_kills()
    display = Display(reader, console)
    inherited = environment.worker_environment(cuda=plan.machine.device == "cuda")
    with _signals_restored(), environment.variables(inherited):
        try:
            with display:
                results = elastic_launch(launch_config, worker.main)(plan, config, writer)
        except ChildFailedError as error:
            when = _when(display.last)
            raise _explain(error, when, _oom_kills() > kills_before, logs) from None
        except SignalException as error:
            raise Interrupted(signal.Signals(error.sigval).name) from None
    peak = max(result.gpu_peak_bytes for result in results.values())
    measurement: Measurement = results[0]
    return replace(measurement, gpu_peak_bytes=peak)


def _when(last: Event | None) -> str:
    """Where in a run its workers were last heard of."""
    if last is None:
        return "at the start"
    return f"{'after' if last.ended else 'during'} {last.phase}"


def _explain(error: Any, when: str, oom_killed: bool, logs: Path) -> WorkerError:
    """What the first failed worker says about itself, or what the kernel says about it."""
    rank, first = error.get_first_failure()
    where = f"the logs are in {logs}"
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        if oom_killed and name == "SIGKILL":
            message = f"rank {rank} was killed by the kernel {when}: the host ran out of memory"
            hint = "pass quant=int4, offload=nvme or a smaller hardware.host_memory_gib"
            return WorkerError("oom", Failure(type="OutOfMemory", message=message, hint=f"{hint}; {where}"))
        message = f"rank {rank} was ended by {name} {when}"
        status: Status = "killed" if name in ("SIGKILL", "SIGTERM", "SIGINT") else "error"
        return WorkerError(status, Failure(type=name, message=message, hint=where, traceback=_log_tail(logs, rank)))
    data = first.error_file_data.get("message", {})
    text = data.get("message", first.message) if isinstance(data, dict) else str(data)
    trace = data.get("extraInfo", {}).get("py_callstack") if isinstance(data, dict) else None
    kind, _, message = text.partition(": ")
    failure = Failure(
        type=kind,
        message=f"{message.strip() or kind} (rank {rank}, {when})",
        hint=_memory_hint(kind, text) or where,
        traceback=trace or _log_tail(logs, rank),
    )
    return WorkerError("oom" if _memory_hint(kind, text) else "error", failure)


def _memory_hint(kind: str, text: str) -> str | None:
    if kind in ("OutOfMemoryError", "AcceleratorError") and "out of memory" in text:
        return "the GPU ran out of memory: pass a smaller workload.batch_size, offload=cpu, quant=int4 or kv_cache=cpu"
    if kind == "MemoryError" or "can't allocate memory" in text or "out of memory" in text:
        return "the host ran out of memory: pass quant=int4, offload=nvme or offload.pin_memory=false"
    return None


def _log_tail(logs: Path, rank: int, lines: int = 40) -> str | None:
    for path in sorted(logs.glob(f"*/attempt_0/{rank}/stderr.log")):
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    return None


def _oom_kills() -> int:
    """How many processes the kernel has killed for memory since boot."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


@contextmanager
def _signals_restored() -> Iterator[None]:
    """torch's elastic launcher leaves its own signal handlers behind."""
    kept = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    }
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
