"""The page: one HTML file with its data, its styles and its scripts, which needs no network."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment
from plotly.offline import get_plotlyjs

from zi_experiments.report import answer_page
from zi_experiments.report.charts import CHARTS
from zi_experiments.report.columns import COLUMNS, Scalar
from zi_experiments.report.runs import Passes, Run, by_column

NAME = "report.html"
_MOST_TIMELINES = 200
_MOST_POINTS = 500  # of a timeline
_DIGITS = 6  # significant ones of a number in the page; the other files have all


def write(runs: list[Run], names: list[str], folder: Path) -> Path:
    """The page of these runs and the names that tell them apart, written into the folder. Returns its path."""
    environment = Environment(autoescape=True)
    # the filter escapes what would end the script element
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    path, answered = folder / NAME, answer_page.sections(runs)
    charts = (*(chart for section in answered for chart in section.charts), *CHARTS)
    path.write_text(
        environment.from_string(_text("page.html")).render(
            styles=_text("page.css"),
            scripts=[_text(f"{name}.js") for name in ("data", "charts", "table", "details")],
            plotly=get_plotlyjs(),
            answers=answered,
            charts=CHARTS,
            counts=_counts(runs),
            data=_data(runs, names) | {"charts": [asdict(chart) for chart in charts]},
        ),
        encoding="utf-8",
    )
    return path


def _data(runs: list[Run], names: list[str]) -> dict[str, Any]:
    """What the scripts of the page read. A column has a value for all runs, one for each, or different ones and codes."""
    return {
        "labels": names,
        "columns": [
            {"name": each.name, "label": each.label, "unit": each.unit, "isShown": each.is_shown} for each in COLUMNS
        ],
        "rows": {name: _coded(_rounded(values)) for name, values in by_column(runs).items()},
        "settings": _by_key([run.settings for run in runs]),
        "environment": _by_key([run.environment for run in runs]),
        "timelines": _timelines(runs),
    }


def _counts(runs: list[Run]) -> dict[str, int]:
    """Runs by status, the most first."""
    statuses = [str(run.row["status"]) for run in runs]
    return dict(sorted(((each, statuses.count(each)) for each in set(statuses)), key=lambda item: -item[1]))


def _by_key(dictionaries: list[dict[str, Scalar]]) -> dict[str, Any]:
    keys: dict[str, Scalar] = {}
    for each in dictionaries:
        keys |= each
    rows = [tuple(map(each.get, keys)) for each in dictionaries]
    return {key: _coded(list(values)) for key, values in zip(keys, zip(*rows, strict=True), strict=False)}


def _coded(values: list[Scalar]) -> dict[str, Any]:
    if values.count(values[0]) == len(values) == list(map(type, values)).count(type(values[0])):  # True is equal to 1
        return {"values": values[:1]}
    if 2 * len(set(values)) > len(values):
        return {"values": values}
    typed = list(zip(map(type, values), values, strict=True))
    codes = {each: code for code, each in enumerate(dict.fromkeys(typed))}
    return {"values": [value for _, value in codes], "codes": [codes[each] for each in typed]}


def _rounded(values: Sequence[Scalar]) -> list[Scalar]:
    return [float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value for value in values]


def _timelines(runs: list[Run]) -> dict[int, list[list[Scalar]]]:
    """By the number of a run: the last step of each point, and its time in s: median, smallest and largest of the passes."""
    found: dict[int, list[list[Scalar]]] = {}
    for number, run in enumerate(runs):
        if len(found) == _MOST_TIMELINES:
            break
        if points := _timeline(run.passes):
            found[number] = points
    return found


def _timeline(passes: Passes) -> list[list[Scalar]]:
    steps = list(zip(*passes.step_s, strict=False))
    width = -(-len(steps) // _MOST_POINTS)
    groups = [steps[start : start + width] for start in range(0, len(steps), width or 1)]
    points = [[median(time for step in group for time in step), *_ends(group)] for group in groups]
    return [[(number + 1) * width, *_rounded(point)] for number, point in enumerate(points)]


def _ends(group: list[tuple[float, ...]]) -> tuple[float, float]:
    return min(map(min, group)), max(map(max, group))


def _text(name: str) -> str:
    return (files("zi_experiments.report") / "page" / name).read_text(encoding="utf-8")
