"""One run, from its composed configuration to its record."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from zi_experiments import environment, lines, plan_only, provenance
from zi_experiments.calibration import this_machine
from zi_experiments.config.composition import composed_run
from zi_experiments.config.schema import InapplicableError, Run, TrackingMode
from zi_experiments.cost_model.plan import Plan
from zi_experiments.cost_model.prediction import predict
from zi_experiments.engines import base
from zi_experiments.execution import failures, launcher, nodes, preflight, sweep
from zi_experiments.execution.preparation import check, prepare
from zi_experiments.models import checkpoint, contents, hashes
from zi_experiments.models.architecture import Architecture
from zi_experiments.planner import search
from zi_experiments.results import explanation, fingerprints, initial, metrics
from zi_experiments.results.record import Failure, Status
from zi_experiments.results.sinks.base import Guarded, Sink
from zi_experiments.results.sinks.console import ConsoleSink, display_path
from zi_experiments.results.sinks.result_file import NAME, ResultFile, to_json
from zi_experiments.runtime import caches, peak_memory, progress, scratch, signals
from zi_experiments.system import machines
from zi_experiments.units import gigabytes

if TYPE_CHECKING:
    from zi_experiments.execution.worker import Measurement  # it imports torch


_SLOW_TO_HASH_BYTES = 10**9  # above this, hashing takes long enough to show progress


class RunFailed(CompactHydraException):
    """A run ended with a status other than ok, or its record could not be written; the reason has been printed."""


def run_job(
    cfg: DictConfig, *, keep: bool = False, tell: Callable[[dict[str, Any]], None] = lambda result: None
) -> None:
    """Carry out one composed run and leave exactly one `result.json`, whatever happens; `plan_only` leaves none.

    With `keep`, a run whose folder has an ok record of the same fingerprint is not carried out again. `tell` is called
    with the record in its JSON form before anything is raised; the status of a kept record is `kept`.

    Raises `RunFailed` when the run is not ok, so that a sweep goes on and the exit code is not 0, and
    `KeyboardInterrupt`, after the record is written, when the user stops it.
    """
    console = Console()
    if initial.setting(cfg, "plan_only") is True:
        if failure := plan_only.carry_out(cfg, console, in_sweep=keep, tell=tell):
            raise RunFailed(failure.message)
        return
    job = _Job(cfg, console)
    try:
        kept = job.carry_out(cfg, keep)
    except KeyboardInterrupt:
        tell(job.record.to_dict())
        raise
    tell(kept or job.record.to_dict())
    if kept is None and not (job.record.status == "ok" and job.is_stored):
        raise RunFailed(f"{job.record.run.name}: {job.record.status}")


class _Job:
    """A run in progress: its record so far, and the sinks that will write it."""

    def __init__(self, cfg: DictConfig, console: Console) -> None:
        self.record = initial.record(cfg)
        self.is_stored = False
        self._begun: Run | None = None  # once it is known that the run is not kept
        self._console = console
        self._file = ResultFile()
        self._sinks: list[Sink] = [Guarded(ConsoleSink(console))]
        self._is_tracked = False
        self._folder = Path(self.record.folder)

    def carry_out(self, cfg: DictConfig, keep: bool) -> dict[str, Any] | None:
        """Carry out the run and return None; or return the JSON record of a run that is kept or skipped."""
        try:
            try:
                if before := self._attempt(cfg, keep):
                    return before
            except InapplicableError as error:
                if self.record.question is not None:
                    return self._skip(str(error))
                self._fail(*failures.explain(error))
            except Exception as error:
                signals.check()  # a library may have made this error of an interrupt
                self._fail(*failures.explain(error))
        except KeyboardInterrupt as interrupt:
            signals.acknowledge()
            self._fail("killed", Failure(type="Interrupted", message=f"stopped by {interrupt}"))
            self._finish()
            raise
        self._finish()
        return None

    def _attempt(self, cfg: DictConfig, keep: bool) -> dict[str, Any] | None:
        run = composed_run(cfg)
        nodes.check(run)
        check(run)
        scratch.check_bases("offload.path", run.offload.folders)
        _settle_caches(self._console)
        launcher.warm_up()  # before anything asks for GPUs
        machine = machines.detect(run.hardware)
        self._update(environment=provenance.describe(machine) | nodes.described())
        may_keep = keep and not run.force and (self._folder / NAME).exists()
        # errors of a checkpoint are found before it is hashed, which takes long
        arch = None if may_keep else contents.load(run)
        self._identify(run)
        if may_keep and (before := self._finished_before()):
            return before
        self._begun = run
        self._file.write(self.record)  # this is what remains if run and launcher are killed
        with self._turn(run, machine):
            return self._planned(run, arch)

    def _planned(self, run: Run, arch: Architecture | None) -> dict[str, Any] | None:
        folders = self._disk_folders(run)
        self._remove_abandoned(folders)
        plan = prepare(run, folders, arch=arch, tell=partial(_say, self._console))
        if plan is None:
            return self._skip(f"the search has no candidate of rank {run.search.rank}")
        self._run(plan)
        return None

    def _skip(self, reason: str) -> dict[str, Any]:
        """Leave no record of the run, say why, and return what a sweep is told instead."""
        self._file.withdraw(self.record)
        _say(self._console, f"skipped {self.record.run.name}: {reason}")
        return self.record.to_dict() | {"status": "skipped"}

    @contextmanager
    def _turn(self, run: Run, machine: machines.Machine) -> Iterator[None]:
        """Reserve devices for this run, while other jobs of its sweep run in other processes."""
        on_gpus = machine.device == "cuda" and machine.gpus_visible > 0
        devices = environment.visible_gpus(machine.gpus_visible) if on_gpus else ["cpu"]
        count = min(run.hardware.num_gpus, len(devices))
        with sweep.turn(devices, count, partial(_say, self._console)) as taken:
            if taken == devices:
                yield
                return
            visible = ",".join(taken)
            self._update(environment={**(self.record.environment or {}), "cuda_visible_devices": visible})
            with environment.variables({"CUDA_VISIBLE_DEVICES": visible}):
                yield

    def _identify(self, run: Run) -> None:
        """Record what a result depends on: settings, code, machine, and the weights by their hashes."""
        self._update(checkpoint=self._checkpoint(run.weights.path))
        fingerprint = fingerprints.fingerprint(self.record)
        self._update(run=replace(self.record.run, fingerprint=fingerprint))

    def _checkpoint(self, path: str | None) -> dict[str, Any] | None:
        if path is None:
            return None
        found = checkpoint.find(path)
        if found is None:
            return {"path": path}  # a name on the hub
        told = progress.shown(self._console) if found.num_bytes > _SLOW_TO_HASH_BYTES else progress.silent()
        told.begin("hash", found.num_bytes, "bytes")
        hashed = hashes.of(found, environment.cache_folder(), told.advance)
        told.end()
        return hashed

    def _finished_before(self) -> dict[str, Any] | None:
        path, fingerprint = self._folder / NAME, self.record.run.fingerprint
        assert fingerprint is not None
        result = fingerprints.finished(path, fingerprint)
        if result is None:
            return None
        _say(self._console, f"kept {self.record.run.name}: {display_path(path)} is ok (force=true runs it again)")
        return result | {"status": "kept"}

    def _remove_abandoned(self, folders: list[Path]) -> None:
        """Remove what killed runs have left, so that this run has the room."""
        temporary = scratch.for_temporary_files(self.record.run.id)
        for path in scratch.remove_abandoned(temporary.parent, *folders):
            _say(self._console, f"removed {display_path(path)}: the run that made it was killed")

    def _measured(self, run: Run, machine: machines.Machine) -> machines.Machine:
        """Return the machine with its rates; measure them now if they are not known."""
        return this_machine.measured(run, machine, self._disk_folders(run), partial(_say, self._console))

    def _disk_folders(self, run: Run) -> list[Path]:
        return scratch.bases_for_weights(run, self._folder / "offload")

    def _run(self, plan: Plan) -> None:
        run = plan.run
        self._update(plan=plan, prediction=predict(plan), config=initial.settled(self.record.config, run))
        if self.record.checkpoint:
            self._update(checkpoint=self.record.checkpoint | _as_read(plan.architecture))
        paths = scratch.for_weights(run, self._folder / "offload", self.record.run.id)
        temporary = scratch.for_temporary_files(self.record.run.id)
        preflight.check(plan, paths, nodes.workers_of_each(run))
        plan = replace(plan, machine=self._measured(run, plan.machine))
        self._update(plan=plan, prediction=predict(plan))
        engine = base.get(run.engine.name)
        config, kind = engine.config(plan, list(map(str, paths))), engine.CONFIG_NAME
        (self._folder / f"{kind}.json").write_text(json.dumps(config, indent=2) + "\n")
        self._update(**{kind: config})
        self._file.open(self.record)
        self._track(run)
        for sink in self._sinks:
            sink.open(self.record)
        with ExitStack() as held:
            held.callback(scratch.Scratch(temporary).close)
            for path in paths:
                held.callback(scratch.Scratch(path).close)
            if paths:
                where = " and ".join(map(display_path, paths))
                _say(self._console, f"disk: needs {gigabytes(plan.placement.nvme_bytes)} in {where}")
            peaks = held.enter_context(peak_memory.Monitor(paths))
            measured = launcher.launch(plan, config, self.record, temporary, self._console, self._progress)
        self._conclude(plan, measured, peaks)

    def _conclude(self, plan: Plan, measured: "Measurement", peaks: peak_memory.Monitor) -> None:
        self._update(stored=measured.stored, verification=measured.verification)
        if measured.samples is None:
            assert measured.verification is not None
            message = f"verification failed: {measured.verification.problem}"
            self._fail("error", Failure(type="VerificationFailed", message=message, hint="nothing was measured"))
            return
        assert self.record.prediction is not None
        host_bytes, disk_bytes = nodes.peaks(peaks.host_peak_bytes, peaks.disk_peak_bytes)
        derived = partial(
            metrics.derive,
            measured.samples,
            prediction=self.record.prediction,
            perplexity=measured.perplexity,
            kl_divergence=measured.kl_divergence,
            gpu_peak_bytes=measured.gpu_peak_bytes,
            host_peak_bytes=host_bytes,
            disk_peak_bytes=disk_bytes,
        )
        figures = derived(plan)
        self._update(status="ok", error=None, samples=measured.samples, generated=measured.generated, metrics=figures)
        if beyond := metrics.passed(figures):
            machine = this_machine.measured_again(
                plan.run, plan.machine, self._disk_folders(plan.run), partial(_say, self._console)
            )
            figures = metrics.without_passed(derived(replace(plan, machine=machine)))
            self._update(plan=replace(plan, machine=machine), metrics=figures, bound_passed=beyond)

    def _advise(self) -> None:
        plan = self.record.plan
        if self.record.status != "ok" or plan is None:
            return
        now, better = search.paced(plan), search.faster(plan)
        if now and better:
            _say(self._console, f"predicted to be {explanation.gain(better, now)}")

    def _track(self, run: Run) -> None:
        self._is_tracked = True
        if run.tracking.mode is not TrackingMode.disabled:
            self._sinks.append(_wandb(run, self._console))

    def _progress(self, event: progress.Event) -> None:
        for sink in self._sinks:
            sink.progress(event)

    def _update(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)

    def _fail(self, status: Status, failure: Failure) -> None:
        self._update(status=status, error=failure)

    def _finish(self) -> None:
        self._update(run=replace(self.record.run, finished_at=_now()))
        path = self._folder / NAME
        if self.record.status == "killed" and self._begun is None and path.exists():
            return  # it is the record of an earlier run, which the next run may keep
        try:
            self._file.write(self.record)
            self.is_stored = True
        except OSError as error:
            reason = error.strerror
        if self._begun is not None and not self._is_tracked and self.record.status != "killed" and _is_of_a_sweep():
            self._track(self._begun)  # its other runs are there too
        for sink in self._sinks:
            sink.write(self.record)
        self._advise()
        if self.is_stored:
            _say(self._console, f"record: {display_path(path)}")
        else:
            _say(self._console, f"{display_path(path)} cannot be written ({reason}), so the record follows")
            self._console.print(to_json(self.record), markup=False, highlight=False, soft_wrap=True)
        for sink in self._sinks:
            sink.close()


def _as_read(arch: Architecture) -> dict[str, Any]:
    """Return what reading the model tells about its checkpoint: commit on the hub, format, and the tensors not loaded."""
    commit, stored = getattr(arch.config, "_commit_hash", None), arch.stored
    form = {"format": stored.format, "bits_per_parameter": stored.bits_per_parameter} if stored else {}
    return ({"commit": commit} if commit else {}) | form | {"ignored_tensors": list(arch.ignored_tensors)}


def _settle_caches(console: Console) -> None:
    if line := caches.settle():
        _say(console, line)


def _say(console: Console, text: str) -> None:
    lines.say(text, console)


def _wandb(run: Run, console: Console) -> Sink:
    environment.prepare_for_wandb(run.tracking.mode.value)
    from zi_experiments.results.sinks.wandb import WandbSink

    return Guarded(WandbSink(run.tracking, console, in_sweep=_is_of_a_multirun()))


def _is_of_a_multirun() -> bool:
    return HydraConfig.get().mode is RunMode.MULTIRUN


def _is_of_a_sweep() -> bool:
    """Return whether the run is one of several: of `-m`, or of `wandb agent`."""
    return _is_of_a_multirun() or environment.variable("WANDB_SWEEP_ID") is not None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
