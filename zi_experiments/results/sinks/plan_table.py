"""Output of `plan_only=true`: where the memory goes, how long the run should take, and what would be faster."""

from rich.console import Console
from rich.table import Table

from zi_experiments import lines
from zi_experiments.cost_model import memory_fit
from zi_experiments.cost_model.bound import lower_bound
from zi_experiments.cost_model.plan import Plan
from zi_experiments.cost_model.prediction import Prediction, cost_per_million_tokens, total_tok_per_s
from zi_experiments.planner.search import Candidate, paced
from zi_experiments.results import explanation
from zi_experiments.results.explanation import LIMITS
from zi_experiments.units import gigabytes, seconds

_MOST_SHOWN = 3  # improvements
_PARTS = {
    "weights": "weights",
    "buffers: transfer, dequantization": "buffers",
    "pool or cache of experts": "experts",
    "KV cache": "kv_cache",
    "activations and logits": "workspace",
    "processes and libraries": "processes",
    "total": "total",
    "available": "available",
}


def show(plan: Plan, prediction: Prediction, better: list[Candidate], console: Console) -> None:
    """Print the plan in tables, and the best candidates of `search.improvements`."""
    console.print(_memory(plan))
    now = paced(plan)
    if lower_bound(plan).unknown or now is None:
        return  # the missing rates are named above the tables
    console.print(_times(plan, prediction))
    for each in better[:_MOST_SHOWN]:
        lines.say(explanation.gain(each, now), console)


def _memory(plan: Plan) -> Table:
    columns = {"each GPU" if use.where == "GPU" else use.where: use for use in memory_fit.uses(plan)}
    table = Table(title="memory")
    table.add_column("")
    unseen = plan.placement.nvme_bytes if "disk" not in columns else 0  # on the disk of another machine
    for name in (*columns, "disk") if unseen else columns:
        table.add_column(name, justify="right")
    for label, part in _PARTS.items():
        amounts = [getattr(use, part) for use in columns.values()]
        if unseen:
            amounts.append(unseen if part in ("weights", "total") else 0)
        if any(amounts):
            table.add_row(label, *(gigabytes(amount) if amount else "" for amount in amounts))
    return table


def _times(plan: Plan, predicted: Prediction) -> Table:
    bound, work = lower_bound(plan), plan.run.workload
    table = Table(title=f"how long it takes; rates: {plan.machine.ceilings.source or 'as given'}")
    table.add_column("")
    columns = ("at least", "limited by", "predicted", "mostly spent on")
    for name in columns if predicted.decode_step_s else columns[:2]:
        table.add_column(name, justify="right" if name in ("at least", "predicted") else "left")
    rows: tuple[tuple[str, float | None, str | None, float | None, str | None], ...] = (
        ("load", None, None, predicted.load_s, None),
        ("prefill", bound.prefill_s, bound.prefill_limited_by, predicted.prefill_s, predicted.prefill_limited_by),
        ("decode step", bound.decode_step_s, bound.limited_by, predicted.decode_step_s, predicted.limited_by),
        ("  over all placements", explanation.over_all_placements(plan), None, None, None),
    )
    for label, least_s, limit, probable_s, most in rows:
        at_least = explanation.least(plan, least_s, limit) if least_s else ""
        cells = (at_least, LIMITS.get(limit or "", ""), _text(probable_s), LIMITS.get(most or "", ""))
        if any(cells):
            table.add_row(label, *cells[: len(table.columns) - 1])
    if predicted.decode_step_s and predicted.total_tok_per_s:
        table.add_row("decode", "", "", f"{work.sequences / predicted.decode_step_s:,.2f} tok/s", "")
        table.add_row("prefill and decode", "", "", f"{predicted.total_tok_per_s:,.2f} tok/s", "")
    if not predicted.decode_step_s:
        _add_limits(table, plan)
    if predicted.cost_per_million_tokens:
        table.add_row("cost per million tokens", "", "", f"{predicted.cost_per_million_tokens:,.2f}", "")
    return table


def _add_limits(table: Table, plan: Plan) -> None:
    """Add what follows from the bound, where nothing is predicted: the most tokens per second, and the least cost."""
    bound = lower_bound(plan)
    most = total_tok_per_s(plan, bound.prefill_s, bound.decode_step_s)
    if most is None:
        return
    table.add_row("prefill and decode", f"at most {most:,.2f} tok/s", "")
    if cost := cost_per_million_tokens(plan, most):
        table.add_row("cost per million tokens", f"{cost:,.2f}", "")


def _text(value: float | None) -> str:
    return seconds(value) if value else ""
