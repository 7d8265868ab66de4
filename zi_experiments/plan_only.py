"""`plan_only=true`: show the plan of a run in seconds, and leave it as `plan.json`. Nothing is loaded."""

from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from zi_experiments import environment
from zi_experiments.config.composition import to_run
from zi_experiments.cost_model.prediction import predict
from zi_experiments.execution.preparation import prepare
from zi_experiments.measurement import perplexity
from zi_experiments.planner import search
from zi_experiments.results import initial, metrics
from zi_experiments.results.record import Record
from zi_experiments.results.sinks import plan_table
from zi_experiments.results.sinks.console import show_plan
from zi_experiments.results.sinks.result_file import PLAN_NAME, to_json
from zi_experiments.runtime import scratch


def show(cfg: DictConfig, record: Record, console: Console) -> Record | None:
    """Print the plan of a run. Return `record` with it: predicted, or the bound where not all rates are known.

    Returns None when its search has no candidate of that rank. Raises `ConfigError` for a run that would be refused.
    """
    run = to_run(cfg)
    metrics.check(run.question)
    perplexity.check_text(run.workload.text)
    plan = prepare(run, scratch.base_for_weights(run, Path(record.folder) / "offload"))
    if plan is None:
        return None
    prediction = predict(plan)
    show_plan(run.name, plan, prediction, console)
    plan_table.show(plan, prediction, search.improvements(plan), console)
    return replace(
        record,
        status="predicted" if prediction.total_tok_per_s else "bound",
        error=None,
        config=initial.settled(record.config, plan.run),
        environment=environment.describe(plan.machine),
        plan=plan,
        prediction=prediction,
    )


def write(record: Record) -> None:
    """Write `plan.json` into the folder of the run."""
    (Path(record.folder) / PLAN_NAME).write_text(to_json(record) + "\n")
