"""What `plan_only=true` shows: what goes where, how long it should take, and what would help."""

from rich.console import Console
from rich.table import Table

from zi_experiments import fit
from zi_experiments.explain import LIMITS
from zi_experiments.plan import Plan
from zi_experiments.predict import predict
from zi_experiments.search import Candidate
from zi_experiments.units import gigabytes, seconds

_MOST_SHOWN = 3  # improvements
_PARTS = {
    "weights": "weights",
    "weights on their way, or expanded": "buffers",
    "keys and values": "kv_cache",
    "activations and logits": "workspace",
    "processes and libraries": "processes",
    "in all": "total",
    "of": "available",
}


def show(plan: Plan, better: list[Candidate], console: Console) -> None:
    """The plan in tables, and of the runs of `search.improvements` the best."""
    console.print(_memory(plan))
    now = predict(plan).total_tok_per_s
    if now is None:
        console.print("no rate of this machine is known: python -m zi_experiments.hardware measures it")
        return
    console.print(_times(plan))
    for each in better[:_MOST_SHOWN]:
        console.print(f"faster: {each.text}, {each.tok_per_s / now:.2f} ×", highlight=False, soft_wrap=True)


def _memory(plan: Plan) -> Table:
    columns = {"each GPU" if use.where == "GPU" else use.where: use for use in fit.uses(plan)}
    table = Table(title="what goes where")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for label, part in _PARTS.items():
        amounts = [getattr(use, part) for use in columns.values()]
        if any(amounts):
            table.add_row(label, *(gigabytes(amount) if amount else "" for amount in amounts))
    return table


def _times(plan: Plan) -> Table:
    bound, predicted, work = plan.bound, predict(plan), plan.run.workload
    table = Table(title=f"how long it takes; rates: {plan.machine.ceilings.source or 'as given'}")
    table.add_column("")
    for name in ("at least", "limited by", "predicted", "mostly"):
        table.add_column(name, justify="right" if name in ("at least", "predicted") else "left")
    rows: tuple[tuple[str, float | None, str | None, float | None, str | None], ...] = (
        ("load", None, None, predicted.load_s, None),
        ("prefill", bound.prefill_s, bound.prefill_limited_by, predicted.prefill_s, predicted.prefill_limited_by),
        ("decode step", bound.decode_step_s, bound.limited_by, predicted.decode_step_s, predicted.limited_by),
    )
    for label, least_s, limit, probable_s, most in rows:
        cells = (_text(least_s), LIMITS.get(limit or "", ""), _text(probable_s), LIMITS.get(most or "", ""))
        table.add_row(label, *cells)
    if predicted.decode_step_s and predicted.total_tok_per_s:
        table.add_row("decode", "", "", f"{work.sequences / predicted.decode_step_s:,.2f} tok/s", "")
        table.add_row("prefill and decode", "", "", f"{predicted.total_tok_per_s:,.2f} tok/s", "")
    return table


def _text(value: float | None) -> str:
    return seconds(value) if value else ""
