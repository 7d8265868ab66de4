"""Start the worker processes, watch them, and return what they measured or raise why they failed."""

import importlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from zi_experiments import environment
from zi_experiments.cost_model import inventory
from zi_experiments.cost_model.plan import Plan
from zi_experiments.execution import failures, nodes
from zi_experiments.measurement.timing import of_ranks
from zi_experiments.results.record import Record
from zi_experiments.runtime import fork_server, scratch, signals
from zi_experiments.runtime.distributed import Place
from zi_experiments.runtime.progress import Display, Event

if TYPE_CHECKING:
    from zi_experiments.execution.worker import Measurement  # it imports torch


_INTERVAL_S = 0.1
_GRACE_S = 2.0  # for a worker to end by itself, or to say where it is
_LONGEST_LOOK_S = 1.0  # that counts: in a longer one this process did not run


def warm_up() -> None:
    """Import what workers need, and start the server that they are forked from."""
    importlib.import_module("torch.distributed.launcher.api")
    importlib.import_module("transformers.generation.utils")
    importlib.import_module("zi_experiments.execution.worker")
    fork_server.start()


def launch(
    plan: Plan,
    config: dict[str, Any],
    record: Record,
    temporary: Path,
    console: Console,
    tell: Callable[[Event], None],
) -> "Measurement":
    """Run the workers of a plan, one process per GPU, here and under the other launchers of this command.

    Return the measurement of rank 0. Its GPU peak is the largest of all ranks, and its `stored` is the sum over them.

    Their progress is shown on the console and passed to `tell`, which has to return at once. Their output goes to files
    under the folder of the record, and their temporary files to `temporary`. Raises `failures.WorkerError` when one fails,
    is killed, or gives no sign of progress for `launch.timeout_s`. A `KeyboardInterrupt` passes through once the workers
    are gone.
    """
    logs, group = Path(record.folder) / "logs", nodes.group()
    if group is None:
        return combined(run_workers(plan, config, logs, temporary, console, tell))

    def tell_all(event: Event) -> None:
        group.tell(failures.when(event))
        tell(event)

    with group.at_work(plan, record) as place:
        results = run_workers(plan, config, logs, temporary, console, tell_all, place=place, look=group.failure)
    others = [answer.results for answer in group.done()]
    return combined(results | {rank: each for answer in others for rank, each in answer.items()})


def combined(results: "dict[int, Measurement]") -> "Measurement":
    """Return what the ranks of a run have measured together."""
    peak = max(result.gpu_peak_bytes for result in results.values())
    stored = inventory.total([result.stored for result in results.values()])
    measured = [found for rank in sorted(results) if (found := results[rank].samples) is not None]
    samples = of_ranks(measured) if len(measured) == len(results) else None
    return replace(results[0], gpu_peak_bytes=peak, stored=stored, samples=samples)


def run_workers(
    plan: Plan,
    config: dict[str, Any],
    logs: Path,
    temporary: Path,
    console: Console,
    tell: Callable[[Event], None],
    *,
    place: Place | None = None,
    look: Callable[[], failures.WorkerError | None] = lambda: None,
    when: Callable[[Event | None], str] = failures.when,
    timeout_s: float | None = None,
) -> "dict[int, Measurement]":
    """Run the workers of this launcher, and return what each has measured by its rank.

    `look` is called all the time: the workers are stopped when it returns an error, which is raised. `timeout_s` is
    `launch.timeout_s` if it is not given.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from zi_experiments.execution import worker

    # they report each failure with its own traceback, which the record has too
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logs.mkdir(parents=True, exist_ok=True)
    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=place.workers if place else plan.run.hardware.num_gpus,
        run_id=datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f"),  # begins the name of the folder of logs
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",  # a free port
        local_addr="127.0.0.1",
        max_restarts=0,
        start_method=fork_server.start_method(),
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )
    reader, writer = multiprocessing.get_context("spawn").Pipe(duplex=False)
    kills_before = failures.oom_kills()
    variables = environment.worker_environment(cuda=plan.machine.device == "cuda") | {"TMPDIR": str(temporary)}
    with (
        scratch.temporary_files_in(temporary),  # torch leaves a file behind for each worker
        environment.variables(variables) as inherited,
        Display(reader, console, tell) as display,
        ThreadPoolExecutor(1, "launch") as threads,
    ):
        # in a thread it leaves signals to us, who look at the workers meanwhile
        running = threads.submit(elastic_launch(launch_config, worker.main), plan, config, inherited, writer, place)
        try:
            timed_out = _watch(running, display, timeout_s or plan.run.launch.timeout_s, look)
            results = running.result()
        except ChildFailedError as error:
            if problem := look():
                raise problem from None
            then = when(display.last)
            if timed_out:
                raise failures.of_silence(plan.run.launch.timeout_s, then, logs) from None
            raise failures.of_worker(error, plan, then, failures.oom_kills() > kills_before, logs, place) from None
        except KeyboardInterrupt:
            signals.acknowledge()
            _stop(running)
            raise
    first = place.first if place else 0
    return {first + worker: result for worker, result in results.items()}


def _watch(running: Future[Any], display: Display, timeout_s: float, look: Callable[[], object] = lambda: None) -> bool:
    """Wait until the workers have ended. Return whether they were killed for giving no sign of progress.

    They are stopped when `look` returns something. Ctrl-Z stops them and this process together: that time does not count as
    silence.
    """
    silent_s, looked_at = 0.0, time.monotonic()
    while not _ended(running, _INTERVAL_S):
        now = time.monotonic()
        silent_s = 0.0 if display.heard_at > looked_at else silent_s + min(now - looked_at, _LONGEST_LOOK_S)
        looked_at = now
        if look():
            _stop(running)
            return False
        if silent_s > timeout_s:
            for process in multiprocessing.active_children():
                _signal(process, signal.SIGUSR1)  # it writes down where it is
            _ended(running, _GRACE_S)
            _stop(running, signal.SIGKILL)
            return True
    return False


def _stop(running: Future[Any], first: signal.Signals = signal.SIGTERM) -> None:
    """End the workers, also those yet to start; SIGKILL ends those that `first` has not ended in time."""
    number, asked_at = first, time.monotonic()
    while True:
        for process in multiprocessing.active_children():
            _signal(process, number)
        if _ended(running, _INTERVAL_S):
            return
        if time.monotonic() - asked_at > _GRACE_S:
            number = signal.SIGKILL


def _signal(process: Any, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process.pid, number)


def _ended(running: Future[Any], timeout_s: float) -> bool:
    return bool(wait([running], timeout_s).done)
