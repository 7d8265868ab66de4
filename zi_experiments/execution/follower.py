"""What the launchers other than the first do: run the workers of each run that the first one sends."""

import hashlib
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any

from rich.console import Console

from zi_experiments import lines
from zi_experiments.calibration import this_machine
from zi_experiments.config.schema import ConfigError
from zi_experiments.cost_model import memory_fit
from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines import base
from zi_experiments.execution import failures, launcher, nodes, preflight
from zi_experiments.execution.nodes import STOP, STOPPED, Done, Failed, Over, When, Work
from zi_experiments.results.record import Failure
from zi_experiments.results.sinks.result_file import NAME, ResultFile
from zi_experiments.runtime import peak_memory, progress, scratch, signals
from zi_experiments.runtime.rendezvous import Hello, Met

_LOOK_S = 1.0


def serve(met: Met, own: Hello, console: Console) -> int:
    """Carry out what the first launcher sends until its command has ended; return the exit code of this one."""
    (first,) = met.peers
    while True:
        message = first.receive(_LOOK_S)
        if isinstance(message, Over):
            return message.code
        if isinstance(message, Work):
            try:
                _Part(message, met, own, console).carry_out()
            except _FirstIsLostError as error:
                lines.say(f"killed {message.record.run.name}: {error}", console)
                return 1
        elif how := first.lost():
            lines.say(nodes.lost(0, first.host, how).failure.message, console)
            return 1


class _FirstIsLostError(Exception):
    pass


class _Part:
    """The part of one run that this launcher has."""

    def __init__(self, work: Work, met: Met, own: Hello, console: Console) -> None:
        self._work, self._own, self._met, self._console = work, own, met, console
        (self._first,) = met.peers
        self._when = "at the start"
        self._end: failures.WorkerError | None = None
        self._id = hashlib.sha256(f"{work.record.run.id} {own.number}".encode()).hexdigest()[:12]
        self._folder = Path(work.record.folder)

    def carry_out(self) -> None:
        """Run the workers and answer. Raises `_FirstIsLostError` once its record has been written."""
        answer: Any
        try:
            answer = self._run(self._work.plan)
        except KeyboardInterrupt as interrupt:
            signals.acknowledge()
            message = f"launcher {self._own.number} on {self._own.host} was stopped by {interrupt}"
            self._answer(Failed(status="killed", failure=Failure(type="Lost", message=message)))
            raise
        except Exception as error:
            answer = STOPPED if error is self._end else self._failed(error)
        if self._end is not None and self._end.failure.type == "Lost":
            self._leave_record(self._end)
            raise _FirstIsLostError(self._end.failure.message)
        self._answer(answer)

    def _answer(self, answer: Done | Failed | str) -> None:
        self._first.send((self._work.record.run.id, answer))

    def _failed(self, error: Exception) -> Failed:
        status, failure = failures.explain(error)
        if isinstance(error, ConfigError):
            failure = replace(failure, message=f"{self._own.host}: {failure.message}")
        return Failed(status=status, failure=failure)

    def _run(self, plan: Plan) -> Done:
        run = plan.run
        bases = scratch.bases_for_weights(run, self._folder / "offload")
        paths = scratch.for_weights(run, self._folder / "offload", self._id)
        temporary = scratch.for_temporary_files(self._id)
        scratch.remove_abandoned(temporary.parent, *bases)
        here = replace(plan, machine=this_machine.known(run, bases))
        preflight.check(here, paths, self._work.ranks_each)
        if problem := memory_fit.problem(here):
            raise ConfigError(problem)
        config = base.get(run.engine.name).config(plan, list(map(str, paths)))
        with ExitStack() as held:
            held.callback(scratch.Scratch(temporary).close)
            for path in paths:
                held.callback(scratch.Scratch(path).close)
            peaks = held.enter_context(peak_memory.Monitor(paths))
            results = launcher.run_workers(
                plan,
                config,
                self._folder / "logs" / f"launcher{self._own.number}",
                temporary,
                self._console,
                _nothing,
                place=nodes.place(self._work, self._own, self._met),
                look=self._look,
                when=lambda last: self._when,
                timeout_s=inf,  # the first launcher hears of progress
            )
        return Done(
            results=results,
            host=self._own.host,
            host_peak_bytes=peaks.host_peak_bytes,
            disk_peak_bytes=peaks.disk_peak_bytes,
        )

    def _look(self) -> failures.WorkerError | None:
        """Return why the workers have to end, if they have to."""
        while self._end is None and (message := self._first.receive(0)) is not None:
            if isinstance(message, When):
                self._when = message.text
            elif message == STOP:
                self._end = failures.WorkerError("killed", Failure(type="Stopped", message="stopped by the first"))
        if self._end is None and (how := self._first.lost()):
            self._end = nodes.lost(0, self._first.host, how)
        return self._end

    def _leave_record(self, end: failures.WorkerError) -> None:
        """Write the record of the run, unless the first launcher, which is lost, has finished it in the same folder."""
        record = self._work.record
        finished = replace(record.run, finished_at=datetime.now(UTC).isoformat(timespec="milliseconds"))
        record = replace(record, run=finished, status=end.status, error=end.failure)
        if ResultFile().write_unless_finished(record):
            lines.say(f"record: {self._folder / NAME}", self._console)


def _nothing(event: progress.Event) -> None:
    pass
