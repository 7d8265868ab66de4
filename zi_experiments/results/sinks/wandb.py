"""Weights & Biases: configuration, series, headline figures, and the files of a run."""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import wandb
from rich.console import Console

from zi_experiments import environment, lines
from zi_experiments.config.schema import Tracking
from zi_experiments.measurement.timing import Pass
from zi_experiments.models.architecture import reason
from zi_experiments.results.record import Record
from zi_experiments.results.sinks.console import display_path
from zi_experiments.results.sinks.result_file import NAME

# how long to wait for W&B's server, unless WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT are set
_PATIENCE_S = {"init_timeout": 10.0, "finish_timeout": 10.0}
_LAST_PATIENCE_S = 1.5  # when the user stops a run


class WandbSink:
    """One W&B run per run, written by the launcher alone."""

    def __init__(self, tracking: Tracking, console: Console, *, in_sweep: bool) -> None:
        self._tracking = tracking
        self._console = console
        self._in_sweep = in_sweep
        self._run: Any = None

    def open(self, record: Record) -> None:
        if self._in_sweep and (shared := environment.forget("WANDB_RUN_ID")):
            self._say(f"WANDB_RUN_ID={shared} is ignored: each run of a sweep has an id of its own")
        asked, why = self._tracking.mode.value, ""
        try:
            mode = login_mode() if asked in ("auto", "online") else asked
            if mode == "offline" and asked == "online":
                why = " (nobody is logged in: wandb login)"
            self._run = self._start(record, mode)
        except wandb.Error as error:
            mode, why = "offline", f" ({reason(error)})"
            self._run = self._start(record, mode)
        if mode == "offline":
            self._say(f"W&B: offline{why}; wandb sync {self._folder()}")
        elif mode == "online":
            self._say(f"W&B: {self._run.url}")

    def _start(self, record: Record, mode: str) -> Any:
        tracking = self._tracking
        disks = ["/"]
        if path := record.config["offload"]["path"]:
            disks.append(path)
        patience: dict[str, Any] = {
            name: limit_s
            for name, limit_s in _PATIENCE_S.items()
            if environment.variable(f"WANDB_{name.upper()}") is None
        }
        return wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            group=record.run.group,
            job_type=environment.variable("WANDB_JOB_TYPE") or "benchmark",
            name=record.run.name,
            tags=[*tracking.tags, *(choice for choice in record.choices.values() if choice)],
            config={"choices": record.choices, "environment": record.environment, **record.config},
            dir=record.folder,
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                finish_timeout_raises=True,
                x_stats_sampling_interval=2.0,
                x_stats_disk_paths=disks,
                **patience,
            ),
        )

    def _folder(self) -> str:
        return display_path(Path(self._run.dir).parent)

    def _say(self, text: str) -> None:
        lines.say(text, self._console)

    def write(self, record: Record) -> None:
        if record.error is not None and record.error.type == "Interrupted":
            _within(_LAST_PATIENCE_S, lambda: self._write(record))
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
        if record.generated is not None:
            self._run.summary["tokens_sha256"] = record.generated.tokens_sha256
        if record.status == "ok":
            self._series(record)
            self._headline(record)
        with suppress(wandb.Error):  # its server no longer answers; the files are on disk, beside W&B's own
            self._artifacts(record)
        self._finish(exit_code=0 if record.status == "ok" else 1)

    def _finish(self, exit_code: int) -> None:
        run, folder = self._run, self._folder()
        self._run = None
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            self._say(f"W&B: its server no longer answers, and the figures are on disk; wandb sync {folder}")

    def close(self) -> None:
        if self._run is not None:
            self._finish(exit_code=1)

    def _series(self, record: Record) -> None:
        run = self._run
        run.define_metric("step/index", hidden=True)
        run.define_metric("step/*", step_metric="step/index")
        run.define_metric("pass/index", hidden=True)
        run.define_metric("pass/*", step_metric="pass/index")
        index = 0
        for number, (phase, one) in enumerate(_passes(record)):
            run.log({"pass/index": number, "pass/ttft_s": one.ttft_s, "pass/total_s": one.total_s})
            if phase == "measured":
                for step_s in one.step_s:
                    run.log({"step/index": index, "step/tpot_s": step_s, "step/pass": number})
                    index += 1

    def _headline(self, record: Record) -> None:
        figures = record.to_dict()["metrics"]
        spread = figures.pop("spread")
        self._run.summary.update({name: value for name, value in figures.items() if value is not None})
        self._run.summary.update({f"{name}_min": low for name, (low, _) in spread.items()})
        self._run.summary.update({f"{name}_max": high for name, (_, high) in spread.items()})

    def _artifacts(self, record: Record) -> None:
        if record.status == "ok":
            rows = [row for number, one in enumerate(_passes(record)) for row in _rows(number, *one)]
            self._run.log({"samples": wandb.Table(columns=["pass", "phase", "token", "seconds"], data=rows)})
        artifact = wandb.Artifact(f"run-{self._run.id}", type="result")
        folder = Path(record.folder)
        for path in (folder / NAME, *sorted(folder.glob("*_config.json")), folder / ".hydra" / "config.yaml"):
            if path.is_file():
                artifact.add_file(str(path))
        self._run.log_artifact(artifact)


def login_mode() -> str:
    """Return what `tracking.mode=auto` means here: "online" if the user is logged in and `wandb offline` is not set."""
    return "online" if wandb.login(prompt=False, verify=False) else "offline"


def _within(timeout_s: float, act: Callable[[], None]) -> None:
    """Run `act` and end W&B's service; if its server does not answer in time, unsent data stays on disk."""

    def act_and_leave() -> None:
        with suppress(Exception):  # the service may be killed below
            act()
            wandb.teardown()

    thread = threading.Thread(target=act_and_leave, name="wandb", daemon=True)
    thread.start()
    thread.join(timeout_s)
    for process in psutil.Process().children() if thread.is_alive() else []:
        if process.name().startswith("wandb"):
            process.kill()


def _passes(record: Record) -> list[tuple[str, Pass]]:
    """Return every pass with its phase, in order."""
    samples = record.samples
    assert samples is not None
    return [("warm-up", one) for one in samples.warmup] + [("measured", one) for one in samples.measured]


def _rows(number: int, phase: str, one: Pass) -> list[list[Any]]:
    return [[number, phase, token, seconds] for token, seconds in enumerate([one.ttft_s, *one.step_s])]
