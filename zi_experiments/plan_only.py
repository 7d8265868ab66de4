"""`plan_only=true`: show the plan of a run in seconds, and leave it as `plan.json`. Nothing is loaded."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from zi_experiments import lines, provenance
from zi_experiments.config.composition import composed_run
from zi_experiments.config.schema import ConfigError, InapplicableError
from zi_experiments.cost_model.prediction import predict
from zi_experiments.execution import failures, preflight
from zi_experiments.execution.preparation import check, prepare
from zi_experiments.planner import search
from zi_experiments.results import initial
from zi_experiments.results.record import Failure, Record
from zi_experiments.results.sinks import plan_table
from zi_experiments.results.sinks.console import show_plan
from zi_experiments.results.sinks.result_file import PLAN_NAME, to_json
from zi_experiments.runtime import caches, scratch, signals


def carry_out(
    cfg: DictConfig, console: Console, *, in_sweep: bool, tell: Callable[[dict[str, Any]], None]
) -> Failure | None:
    """Show the plan of a run, and leave it as `plan.json`. Return why it is refused; None: it is not.

    In a sweep the plan is only told, with the text that would have been shown, since the end of the sweep shows all.
    """
    text = StringIO()
    shown = Console(file=text, width=console.width) if in_sweep else console
    record = initial.record(cfg)
    try:
        if line := caches.settle():
            lines.say(line, console)
        with console.status(f"plan: {record.run.name}") if in_sweep else nullcontext():
            planned = _planned(cfg, record, shown)
        if planned is None and in_sweep:
            tell(record.to_dict() | {"status": "skipped"})
            return None
        if planned is None:
            raise ConfigError(f"the search has no candidate of rank {cfg.search.rank}: pass search.rank=0")
        record = planned
    except Exception as error:
        if isinstance(error, InapplicableError) and in_sweep and record.question is not None:
            lines.say(f"skipped {record.run.name}: {error}", console)
            tell(record.to_dict() | {"status": "skipped"})
            return None
        signals.check()  # a library may have made this error of an interrupt
        status, failure = failures.explain(error)
        record = replace(record, status=status, error=failure)
        trace = f"\n{failure.traceback}" if failure.traceback else ""
        lines.say(f"{status} {failure.message}{trace}", shown if status == "refused" else console)
    (Path(record.folder) / PLAN_NAME).write_text(to_json(record) + "\n")
    tell(record.to_dict() | ({"shown": text.getvalue()} if in_sweep else {}))
    return record.error


def _planned(cfg: DictConfig, record: Record, console: Console) -> Record | None:
    """Print the plan of a run. Return `record` with it: predicted, or the bound where not all rates are known.

    Returns None when its search has no candidate of that rank. Raises `ConfigError` for a run that would be refused.
    """
    run = composed_run(cfg)
    check(run)
    plan = prepare(run, scratch.bases_for_weights(run, Path(record.folder) / "offload"))
    if plan is None:
        return None
    preflight.check_texts(plan)
    prediction = predict(plan)
    show_plan(run.name, plan, prediction, console)
    plan_table.show(plan, prediction, search.improvements(plan), console)
    return replace(
        record,
        status="predicted" if prediction.total_tok_per_s else "bound",
        error=None,
        config=initial.settled(record.config, plan.run),
        environment=provenance.describe(plan.machine),
        plan=plan,
        prediction=prediction,
    )
