"""One run from its composed configuration to its record: the flow, from left to right."""

import json
import shutil
import traceback
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from zi_experiments import engines, environment, launch, memory, metrics, planner, preflight
from zi_experiments.config import ConfigError, Run, TrackingMode, to_run
from zi_experiments.record import Failure, Record, RunInfo, Status
from zi_experiments.sinks import Guarded, Sink
from zi_experiments.sinks.console import ConsoleSink, display_path, gigabytes, show_plan
from zi_experiments.sinks.result_file import ResultFile


class RunFailed(CompactHydraException):
    """A run ended with a status other than ok; its record says why."""

    def __init__(self, name: str, record: Record | None) -> None:
        super().__init__(f"{name}: {record.status if record else 'refused'}")
        self.record = record


def run_job(cfg: DictConfig) -> Record | None:
    """Carry out one composed run and leave exactly one `result.json`, whatever happens; `plan_only` leaves none.

    Returns the record, or None for `plan_only`. Raises `RunFailed` when the run is not ok, so that a sweep goes on and
    the exit code is not 0, and `KeyboardInterrupt`, after the record is written, when the user stops it.
    """
    console = Console()
    if cfg.plan_only:
        _only_plan(cfg, console)
        return None
    record = _Job(cfg, console).carry_out(cfg)
    if record.status != "ok":
        raise RunFailed(record.run.name, record)
    return record


def _only_plan(cfg: DictConfig, console: Console) -> None:
    try:
        run = to_run(cfg)
        show_plan(run.name, planner.plan_run(run), console)
    except ConfigError as error:
        console.print(f"refused {error}", markup=False, highlight=False, soft_wrap=True)
        raise RunFailed(str(cfg.name), None) from error


class _Job:
    """A run under way: its record as far as it has got, and the sinks that will have it."""

    def __init__(self, cfg: DictConfig, console: Console) -> None:
        self._console = console
        self._sinks: list[Sink] = [ResultFile(), Guarded(ConsoleSink(console))]
        self._record = _begin(cfg)
        self._folder = Path(self._record.folder)

    def carry_out(self, cfg: DictConfig) -> Record:
        try:
            self._run(to_run(cfg))
        except ConfigError as error:
            self._fail("refused", Failure(type="ConfigError", message=str(error)))
        except launch.WorkerError as error:
            self._fail(error.status, error.failure)
        except KeyboardInterrupt as error:
            how = f"stopped by {error}" if str(error) else "interrupted"
            self._fail("killed", Failure(type="Interrupted", message=how))
            raise
        except Exception as error:
            trace = traceback.format_exc()
            self._fail("error", Failure(type=type(error).__name__, message=str(error), traceback=trace))
        finally:
            self._finish()
        return self._record

    def _run(self, run: Run) -> None:
        plan = planner.plan_run(run)
        self._update(plan=plan, environment=environment.describe(plan.machine))
        scratch = preflight.scratch_folder(run, self._folder / "offload", self._record.run.id)
        preflight.check(plan, scratch)
        config = engines.get(run.engine.name).config(plan, str(scratch) if scratch else None)
        kind = "ds_config" if run.engine.name == "deepspeed" else "engine_config"
        (self._folder / f"{kind}.json").write_text(json.dumps(config, indent=2) + "\n")
        self._update(**{kind: config})
        if run.tracking.mode is not TrackingMode.disabled:
            self._sinks.append(_wandb(run, self._console))
        for sink in self._sinks:
            sink.open(self._record)
        if scratch is not None:
            needed = gigabytes(plan.placement.nvme_bytes)
            self._console.print(
                f"disk: needs {needed} in {display_path(scratch)}", markup=False, highlight=False, soft_wrap=True
            )
        try:
            with memory.Monitor(scratch) as peaks:
                measured = launch.launch(plan, config, self._folder / "logs", self._console)
        finally:
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)
        self._update(verification=measured.verification)
        if measured.samples is None:
            assert measured.verification is not None
            message = f"verification failed: {measured.verification.problem}"
            self._fail("error", Failure(type="VerificationFailed", message=message, hint="nothing was measured"))
            return
        figures = metrics.derive(
            measured.samples,
            plan,
            perplexity=measured.perplexity,
            gpu_peak_bytes=measured.gpu_peak_bytes,
            host_peak_bytes=peaks.host_peak_bytes,
            disk_peak_bytes=peaks.disk_peak_bytes,
        )
        self._update(status="ok", samples=measured.samples, metrics=figures)

    def _update(self, **changes: Any) -> None:
        self._record = replace(self._record, **changes)

    def _fail(self, status: Status, failure: Failure) -> None:
        self._update(status=status, error=failure)

    def _finish(self) -> None:
        self._update(run=replace(self._record.run, finished_at=_now()))
        for sink in self._sinks:
            sink.write(self._record)
        for sink in self._sinks:
            sink.close()


def _begin(cfg: DictConfig) -> Record:
    """The record of a run of which nothing is known yet but what was asked."""
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    group = OmegaConf.select(cfg, "tracking.group")
    if group is None and hydra.mode is RunMode.MULTIRUN:
        sweep = Path(hydra.sweep.dir)
        group = f"{sweep.parent.name}/{sweep.name}"
    return Record(
        run=RunInfo(
            id=uuid.uuid4().hex[:12],
            name=str(OmegaConf.select(cfg, "name")),
            group=group,
            started_at=_now(),
            finished_at=None,
            command=environment.command(),
            git_revision=environment.git_revision(),
        ),
        folder=str(folder),
        choices={group: choice for group, choice in hydra.runtime.choices.items() if not group.startswith("hydra/")},
        config=_plain(cfg),
    )


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain data; unresolved where it cannot be resolved, since the record must exist all the same."""
    try:
        return OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)  # type: ignore[return-value]
    except OmegaConfBaseException:
        return OmegaConf.to_container(cfg, enum_to_str=True)  # type: ignore[return-value]


def _wandb(run: Run, console: Console) -> Sink:
    from zi_experiments.sinks.wandb import WandbSink

    return Guarded(WandbSink(run.tracking, console))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
