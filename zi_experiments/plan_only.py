"""`plan_only=true`: show the plan of a run in seconds. Nothing is loaded, and no file is left."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from zi_experiments.config.composition import to_run
from zi_experiments.config.schema import ConfigError
from zi_experiments.cost_model.prediction import predict
from zi_experiments.execution.preparation import prepare
from zi_experiments.measurement import text
from zi_experiments.planner import search
from zi_experiments.results.sinks import plan_table
from zi_experiments.results.sinks.console import show_plan
from zi_experiments.runtime import scratch


def show(cfg: DictConfig, console: Console) -> None:
    """Print the plan of a run. Raises `ConfigError` for a run that would be refused."""
    run = to_run(cfg)
    text.check(run.workload)
    plan = prepare(run, scratch.base_for_weights(run, Path(HydraConfig.get().runtime.output_dir) / "offload"))
    if plan is None:
        raise ConfigError(f"the search has no candidate of rank {run.search.rank}: pass search.rank=0")
    prediction = predict(plan)
    show_plan(run.name, plan, prediction, console)
    plan_table.show(plan, prediction, search.improvements(plan), console)
