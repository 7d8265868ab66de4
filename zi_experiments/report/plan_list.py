"""The plans of a sweep in one table."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zi_experiments.report import formats
from zi_experiments.report.answers import short, varied
from zi_experiments.report.comparison import number
from zi_experiments.report.runs import PLANNED, Run
from zi_experiments.results.explanation import LIMITS


def show(runs: list[Run], console: Console) -> None:
    """Print the plans of a sweep: the most generated tokens per second first, and last those that are refused."""
    plans = sorted(zip(varied(runs), runs, strict=True), key=lambda plan: rate(plan[1]), reverse=True)
    table = Table(title=f"{len(runs)} plans", caption=_caption(runs), caption_justify="left")
    for key in plans[0][0]:
        table.add_column(escape(short(key)), overflow="fold")
    for header in ("tok/s", "each token"):
        table.add_column(header, justify="right")
    table.add_column("limited by, or why not", overflow="fold")
    for telling, run in plans:
        table.add_row(*map(escape, telling.values()), *_figures(run), escape(_why(run)))
    console.print(table)


def rate(run: Run) -> float:
    """Return the planned tokens per second over prefill and decode; 0 where they are not known, −1 for what is no plan."""
    return (number(run, "total_tok_per_s") or 0) if run.row["status"] in PLANNED else -1


def _figures(run: Run) -> tuple[str, str]:
    tok_per_s, step_s = rate(run), number(run, "tpot_p50_s")
    if tok_per_s <= 0 or step_s is None:
        return "", ""
    most, least = ("≤ ", "≥ ") if run.row["status"] == "bound" else ("", "")
    return f"{most}{formats.text(tok_per_s, 'tok/s')}", f"{least}{formats.text(step_s, 's')}"


def _why(run: Run) -> str:
    status = str(run.row["status"])
    if status not in PLANNED:
        return f"{status}: {run.row['error']}" if run.row["error"] else status
    limit = run.row["predicted_limited_by" if status == "predicted" else "bound_limited_by"]
    return LIMITS.get(str(limit), "") if rate(run) else "no rates of this machine are known"


def _caption(runs: list[Run]) -> str:
    text = "tok/s: generated tokens over prefill and decode"
    if any(run.row["status"] == "bound" for run in runs):
        text += "; ≤ and ≥: limits, since not all rates are measured"
    return text
