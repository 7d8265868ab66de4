"""Weights & Biases: configuration, series, headline figures, and the files of a run."""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import wandb
from rich.console import Console

from zi_experiments import environment
from zi_experiments.config import Tracking, TrackingMode
from zi_experiments.measure import Pass
from zi_experiments.record import Record
from zi_experiments.sinks.console import display_path
from zi_experiments.sinks.result_file import NAME

_PATIENCE_S = 1.5  # with a server, when the user stops a run


class WandbSink:
    """One W&B run per run, written by the launcher alone."""

    def __init__(self, tracking: Tracking, console: Console) -> None:
        self._tracking = tracking
        self._console = console
        self._run: Any = None

    def open(self, record: Record) -> None:
        tracking = self._tracking
        mode = environment.wandb_mode() if tracking.mode is TrackingMode.auto else tracking.mode.value
        disks = ["/"]
        if path := record.config["offload"]["path"]:
            disks.append(path)
        self._run = wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            group=record.run.group,
            job_type="benchmark",
            name=record.run.name,
            tags=[*tracking.tags, *(choice for choice in record.choices.values() if choice)],
            config={"choices": record.choices, "environment": record.environment, **record.config},
            dir=record.folder,
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(
                silent=True, console="off", disable_code=True, x_stats_sampling_interval=2.0, x_stats_disk_paths=disks
            ),
        )
        if mode == "offline":
            folder = display_path(Path(self._run.dir).parent)
            self._console.print(f"W&B: offline; wandb sync {folder}", markup=False, highlight=False, soft_wrap=True)
        elif mode == "online":
            self._console.print(f"W&B: {self._run.url}", markup=False, highlight=False, soft_wrap=True)

    def write(self, record: Record) -> None:
        if record.error is not None and record.error.type == "Interrupted":
            _within(_PATIENCE_S, lambda: self._write(record))
        else:
            self._write(record)

    def _write(self, record: Record) -> None:
        if self._run is None:
            return
        self._run.summary["status"] = record.status
        if record.error is not None:
            self._run.summary["error"] = record.error.message
        if record.verification is not None:
            self._run.summary["verified"] = record.verification.passed
        if record.status == "ok":
            self._series(record)
            self._headline(record)
        self._files(record)
        self._run.finish(exit_code=0 if record.status == "ok" else 1)
        self._run = None

    def close(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=1)
            self._run = None

    def _series(self, record: Record) -> None:
        assert record.samples is not None
        run = self._run
        run.define_metric("step/index", hidden=True)
        run.define_metric("step/*", step_metric="step/index")
        run.define_metric("pass/index", hidden=True)
        run.define_metric("pass/*", step_metric="pass/index")
        rows: list[list[Any]] = []
        index = 0
        phases = [("warm-up", one) for one in record.samples.warmup]
        phases += [("measured", one) for one in record.samples.measured]
        for number, (phase, one) in enumerate(phases):
            run.log({"pass/index": number, "pass/ttft_s": one.ttft_s, "pass/total_s": one.total_s})
            rows += _rows(number, phase, one)
            if phase == "measured":
                for step_s in one.step_s:
                    run.log({"step/index": index, "step/tpot_s": step_s, "step/pass": number})
                    index += 1
        run.log({"samples": wandb.Table(columns=["pass", "phase", "token", "seconds"], data=rows)})

    def _headline(self, record: Record) -> None:
        figures = record.to_dict()["metrics"]
        spread = figures.pop("spread")
        self._run.summary.update({name: value for name, value in figures.items() if value is not None})
        self._run.summary.update({f"{name}_min": low for name, (low, _) in spread.items()})
        self._run.summary.update({f"{name}_max": high for name, (_, high) in spread.items()})

    def _files(self, record: Record) -> None:
        artifact = wandb.Artifact(f"run-{self._run.id}", type="result")
        folder = Path(record.folder)
        for path in (folder / NAME, folder / "ds_config.json", folder / ".hydra" / "config.yaml"):
            if path.is_file():
                artifact.add_file(str(path))
        self._run.log_artifact(artifact)


def _within(timeout_s: float, act: Callable[[], None]) -> None:
    """Act, and end W&B's service with it; when its server does not answer in time, what is not sent stays on disk."""

    def act_and_leave() -> None:
        with suppress(Exception):  # of a service that is killed below
            act()
            wandb.teardown()

    thread = threading.Thread(target=act_and_leave, name="wandb", daemon=True)
    thread.start()
    thread.join(timeout_s)
    for process in psutil.Process().children() if thread.is_alive() else []:
        if process.name().startswith("wandb"):
            process.kill()


def _rows(number: int, phase: str, one: Pass) -> list[list[Any]]:
    return [[number, phase, token, seconds] for token, seconds in enumerate([one.ttft_s, *one.step_s])]
