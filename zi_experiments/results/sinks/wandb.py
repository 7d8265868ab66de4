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
from zi_experiments.quoting import reason
from zi_experiments.results import metrics
from zi_experiments.results.record import Record
from zi_experiments.results.sinks.console import display_path
from zi_experiments.results.sinks.result_file import NAME
from zi_experiments.runtime.latest import Latest
from zi_experiments.runtime.progress import Event

# how long to wait for W&B's server, unless WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT are set
_PATIENCE_S = {"init_timeout": 10.0, "finish_timeout": 10.0}
_LAST_PATIENCE_S = 1.5  # when the user stops a run
# for all that W&B does at the end of a run without a limit of its own: it takes some thousand rows of history a second
_MARGIN_S, _ROW_S = 20.0, 0.002
_NOT_TO_COMPARE = {"memory", "rates", "notes"}  # of the plan: long, and in result.json


class WandbSink:
    """One W&B run per run, written by the launcher alone."""

    def __init__(self, tracking: Tracking, console: Console, *, in_sweep: bool) -> None:
        self._tracking = tracking
        self._console = console
        self._in_sweep = in_sweep
        self._run: Any = None
        self._latest: Latest | None = None

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
        self._run.summary.update({"phase": "start", "phase_done": 0.0})
        self._latest = Latest(self._tell)

    def progress(self, event: Event) -> None:
        if self._latest is not None:
            self._latest.put(event)

    def _tell(self, event: Event) -> None:
        done = event.completed / event.total if event.total else float(event.ended)
        self._run.summary.update({"phase": event.phase, "phase_done": done})

    def _start(self, record: Record, mode: str) -> Any:
        tracking = self._tracking
        disks = ["/"]
        if path := record.config["offload"]["path"]:
            disks += [path] if isinstance(path, str) else path
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
            config={"choices": record.choices, "environment": record.environment, **_plan(record), **record.config},
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
            _within(_LAST_PATIENCE_S, lambda: self._leave(record))
            return
        if self._run is None:
            self.open(record)
        folder, finish_s = self._folder(), environment.variable("WANDB_FINISH_TIMEOUT") or _PATIENCE_S["finish_timeout"]
        rows = sum(len(one.step_s) for _, one in _passes(record)) if record.samples else 0
        if not _within(float(finish_s) + _MARGIN_S + rows * _ROW_S, lambda: self._write(record)):
            self._run = None
            self._say(f"W&B: its service no longer answers, and the figures are in {NAME}; what it has is in {folder}")

    def _leave(self, record: Record) -> None:
        if self._run is not None:
            self._write(record)
        wandb.teardown()

    def _write(self, record: Record) -> None:
        if self._latest is not None:
            self._latest.close(_LAST_PATIENCE_S)
        outcome = record.status if record.error is None else f"{record.status}: {record.error.type}"
        # W&B groups by configuration alone, and the plan may have been computed anew
        self._run.config.update({"outcome": outcome, **_plan(record)}, allow_val_change=True)
        self._run.summary.update({"status": record.status, "failed": int(record.status != "ok")})
        if record.error is not None:
            why = {"error": record.error.message, "error_type": record.error.type, "hint": record.error.hint}
            self._run.summary.update({key: value for key, value in why.items() if value is not None})
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
        run.define_metric("timeline/step", hidden=True)
        run.define_metric("timeline/*", step_metric="timeline/step")
        index = 0
        for number, (phase, one) in enumerate(_passes(record)):
            run.log({"pass/index": number, "pass/ttft_s": one.ttft_s, "pass/total_s": one.total_s})
            if phase == "measured":
                for step_s in one.step_s:
                    run.log({"step/index": index, "step/tpot_s": step_s, "step/pass": number})
                    index += 1
        assert record.samples is not None
        for step, tpot_s in enumerate(metrics.timeline(record.samples), start=1):
            run.log({"timeline/step": step, "timeline/tpot_s": tpot_s})

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


def _within(timeout_s: float, act: Callable[[], object]) -> bool:
    """Return whether `act` has ended in time. If not, W&B's service is killed; what it has not sent stays on disk."""
    failures = list[Exception]()

    def try_it() -> None:
        try:
            act()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=try_it, name="wandb", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        for process in psutil.Process().children():
            if process.name().startswith("wandb"):
                process.kill()
        with suppress(Exception):  # it has nobody to take leave of
            wandb.teardown()
        return False
    if failures:
        raise failures[0]
    return True


def _plan(record: Record) -> dict[str, Any]:
    """Return the plan as a part of W&B's configuration; empty before there is one."""
    plan = record.to_dict()["plan"] or {}
    return {"plan": {key: value for key, value in plan.items() if key not in _NOT_TO_COMPARE}} if plan else {}


def _passes(record: Record) -> list[tuple[str, Pass]]:
    """Return every pass with its phase, in order."""
    samples = record.samples
    assert samples is not None
    return [("warm-up", one) for one in samples.warmup] + [("measured", one) for one in samples.measured]


def _rows(number: int, phase: str, one: Pass) -> list[list[Any]]:
    return [[number, phase, token, seconds] for token, seconds in enumerate([one.ttft_s, *one.step_s])]
