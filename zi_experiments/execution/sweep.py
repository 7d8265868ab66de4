"""The runs of one `-m` command: in its own process or, with another of Hydra's launchers, in several."""

import atexit
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from zi_experiments import environment, lines
from zi_experiments.config.resolvers import register
from zi_experiments.runtime import scratch, signals
from zi_experiments.runtime.locks import FolderLock

Job = tuple[list[str], dict[str, Any]]  # the overrides of a run, and its record

_LOOK_S = 1.0
_TURN_S = 0.2
_GRACE_S = 10.0


class Sweep(Callback):
    """A Hydra callback: the command's process holds the lock of the sweep, and gives its jobs a folder.

    A launcher that starts processes for jobs sends each of them a copy of this object.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """End the process when another one runs the sweep of that folder."""
        lock = FolderLock(Path(config.hydra.sweep.dir))  # held until this process ends
        try:
            is_ours = lock.acquire()
        except OSError:
            is_ours = True  # a filesystem without locks
        if not is_ours:
            text = "refused: another process runs this sweep: wait for it, or pass hydra.sweep.dir=/another/folder"
            sys.exit(lines.fit(text, sys.stderr))
        folder = scratch.for_temporary_files(uuid.uuid4().hex[:12])
        if "SlurmLauncher" in str(config.hydra.launcher.get("_target_")):
            global _is_in_queue
            _is_in_queue = True
            # other machines see the folder of the sweep
            folder = Path(config.hydra.sweep.dir).absolute() / folder.name
        atexit.register(scratch.Scratch(folder).close)
        environment.set_sweep(folder)
        (folder / "output").write_text(config.hydra.sweep.dir)

    def __getstate__(self) -> dict[str, Any]:
        return {"command_line": sys.argv, "sweep": environment.sweep_variables()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Do what Hydra needs to compose a job in a process that has not run `main`."""
        sys.argv = state["command_line"]
        environment.set_variables(state["sweep"])
        register()

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not environment.runs_a_job_elsewhere():
            return
        _take_requeue()
        signals.install()
        multiprocessing.set_start_method("spawn", force=True)  # joblib's own method is unknown to workers
        of_several = environment.launched()
        if of_several is None or of_several.number == 0:
            _wait_for_run(Path(config.hydra.runtime.output_dir))
        if not environment.is_job_of_slurm():
            _mark().parent.mkdir(exist_ok=True)
            _mark().touch()
            threading.Thread(target=_end_with_the_command, name="sweep", daemon=True).start()


_is_in_queue = False  # whether the jobs of this command are in a queue, and outlive it
_requeue: tuple[int, Callable[[int, Any], None]] | None = None
_run_lock: FolderLock | None = None


def _take_requeue() -> None:
    """Note the handler by which submitit puts a job that is preempted into the queue again, and its signal."""
    global _requeue
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        handler = signal.getsignal(number)
        if getattr(handler, "__name__", "") == "checkpoint_and_try_requeue":
            assert callable(handler)
            _requeue = (number, handler)


def requeue(interrupt: str) -> None:
    """Put this job into its queue again, and end this process, if that signal says that it is preempted."""
    if _requeue is not None and signal.Signals(_requeue[0]).name == interrupt:
        number, handler = _requeue
        handler(number, None)


def _wait_for_run(folder: Path) -> None:
    """Hold the folder of this process's run, once a job of an earlier submission that has the same run has ended."""
    global _run_lock
    if _run_lock is not None:
        _run_lock.release()
    _run_lock, is_waiting = FolderLock(folder), False
    with suppress(OSError):  # a filesystem without locks
        while not _run_lock.acquire():
            if not is_waiting:
                print(f"waiting: another job carries out the run in {folder}", flush=True)
                is_waiting = True
            time.sleep(_LOOK_S)


def _end_with_the_command() -> None:
    """Wait until the command has ended, then stop this job in the way that a command is stopped."""
    folder = environment.sweep()
    while folder is not None and scratch.is_held(folder):
        time.sleep(_LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)


def tell(number: int, overrides: list[str], result: dict[str, Any]) -> None:
    """Report a job to the command: its number, its overrides, and its record."""
    folder = environment.sweep()
    assert folder is not None
    text = json.dumps([overrides, result])
    with suppress(FileNotFoundError):  # the command has ended
        (folder / f".{number}.json").write_text(text)
        (folder / f".{number}.json").replace(folder / f"{number}.json")
    _mark().unlink(missing_ok=True)


def fail() -> None:
    """Report to the command that a job is not ok."""
    if folder := environment.sweep():
        with suppress(FileNotFoundError):
            (folder / "failed").touch()


def what_goes_on() -> str | None:
    """Return what is to be said of jobs that go on when this command is stopped; None: there are none."""
    if not _is_in_queue:
        return None
    return (
        "jobs in the queue go on: type the same command again to see their results, or scancel --name=zi_experiments "
        "to have none"
    )


def has_failed() -> bool:
    """Return whether a job of this command is not ok."""
    folder = environment.sweep()
    return folder is not None and (folder / "failed").exists()


def told() -> list[Job]:
    """Return the overrides and the record of each reported job of this command, in the order of their numbers."""
    folder = environment.sweep()
    files = sorted(folder.glob("*.json"), key=lambda path: int(path.stem)) if folder else []
    return [tuple(json.loads(path.read_text())) for path in files]


def output() -> Path:
    """Return the folder of this command's jobs, as it was typed."""
    folder = environment.sweep()
    assert folder is not None
    return Path((folder / "output").read_text())


def stop_jobs() -> None:
    """Stop jobs in other processes and wait until each has written its record: their launcher would kill them."""
    folder, until = environment.sweep(), time.monotonic() + _GRACE_S
    marks = list(folder.glob("jobs/*")) if folder else []
    for mark in marks:
        with suppress(ProcessLookupError):
            os.kill(int(mark.name), signal.SIGTERM)
    while any(mark.exists() for mark in marks) and time.monotonic() < until:
        time.sleep(_TURN_S)


def _mark() -> Path:
    """Return the file that exists while the job of this process runs."""
    folder = environment.sweep()
    assert folder is not None
    return folder / "jobs" / str(os.getpid())


@contextmanager
def turn(devices: list[str], count: int, say: Callable[[str], None]) -> Iterator[list[str]]:
    """Yield `count` of `devices` that no other job of the sweep uses meanwhile, since sharing would distort the times.

    Waits for them, and says so. Yields all devices if jobs run one after another, in the process of the command, and if
    Slurm has reserved them.
    """
    folder = environment.sweep()
    if folder is None or not environment.runs_a_job_elsewhere() or environment.is_job_of_slurm():
        yield devices
        return
    with ExitStack() as held:
        is_waiting = False
        while len(taken := _free(folder, devices, count, held)) < count:
            held.close()
            if not is_waiting:
                say(
                    f"waiting for {'the processor' if devices == ['cpu'] else 'a GPU'}: other runs of this sweep have it"
                )
                is_waiting = True
            time.sleep(_TURN_S)
        yield taken


def _free(folder: Path, devices: list[str], count: int, held: ExitStack) -> list[str]:
    """Hold the first free devices, at most `count`, and return them."""
    taken: list[str] = []
    for device in devices:
        place = folder / "devices" / device
        place.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(place)
        if len(taken) < count and lock.acquire():
            held.callback(lock.release)
            taken.append(device)
        else:
            lock.release()
    return taken
