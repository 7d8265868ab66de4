"""The picture of a report for a README: decode throughput of runs that differ by engine, as an SVG without scripts."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from zi_experiments.report.comparison import DECODE, number
from zi_experiments.report.runs import Run

NAME = "report.svg"
_SHARED = ("model", "quant", "offload", "sequences", "prompt_len", "machine")  # by the runs of a group
_MOST_GROUPS = 6
_MOST_BARS = 8  # of a group
_WIDTH, _LABEL, _BAR, _ROW, _GAP = 760, 150, 380, 24, 20


def write(runs: list[Run], folder: Path) -> list[Path]:
    """Write the picture into the folder and return its path; none if no run has a decode throughput."""
    drawn = draw(runs)
    if drawn is None:
        (folder / NAME).unlink(missing_ok=True)  # of an earlier report
        return []
    (folder / NAME).write_text(drawn, encoding="utf-8")
    return [folder / NAME]


def draw(runs: list[Run]) -> str | None:
    """Return the SVG: a bar for each run, as long as its share of the fastest in its group; None without any run.

    Groups of several runs come before single runs, which are left out where there is such a group.
    """
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if number(run, DECODE):
            groups.setdefault(tuple(run.row[name] for name in _SHARED), []).append(run)
    compared = [group for group in groups.values() if len(group) > 1] or list(groups.values())
    if not compared:
        return None
    placed, top = [], _GAP
    for group in compared[:_MOST_GROUPS]:
        placed.append({"title": _title(group[0]), "y": top, "bars": _bars(group, top)})
        top += _ROW * (len(group[:_MOST_BARS]) + 1) + _GAP
    template = (files("zi_experiments.report") / "page" / "picture.svg").read_text(encoding="utf-8")
    sizes = {"width": _WIDTH, "height": top, "label": _LABEL, "row": _ROW}
    return Environment(autoescape=True, keep_trailing_newline=True).from_string(template).render(groups=placed, **sizes)


def _title(run: Run) -> str:
    row = run.row
    sequences = "" if row["sequences"] is None else f", {row['sequences']} sequences"
    return f"{row['model']}, {row['quant']}, offload={row['offload']}{sequences}, {row['machine'] or 'unknown machine'}"


def _bars(group: list[Run], top: int) -> list[dict[str, Any]]:
    """Return the bars of a group, the fastest first."""
    rates = sorted(((number(run, DECODE) or 0.0, run) for run in group), key=lambda pair: -pair[0])[:_MOST_BARS]
    return [
        {
            "y": top + _ROW * (place + 1),
            "width": f"{_BAR * rate / rates[0][0]:.1f}",
            "label": " ".join(str(each) for each in (run.row["engine"], run.settings.get("engine.profile")) if each),
            "value": f"{rate:,.{1 if rate >= 10 else 2}f} tok/s{_share(run)}",
        }
        for place, (rate, run) in enumerate(rates)
    ]


def _share(run: Run) -> str:
    share = number(run, "fraction_of_bound")
    return "" if share is None else f", {100 * share:.0f} % of its bound"
