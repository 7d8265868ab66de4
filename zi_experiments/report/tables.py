"""The runs as tables for other programs: CSV and Parquet with all columns, Markdown with those that the page shows."""

import re
from pathlib import Path

import polars

from zi_experiments.report import formats
from zi_experiments.report.columns import COLUMNS, Scalar
from zi_experiments.report.runs import Run

_MARKUP = re.compile(r"([\\|<>*_`\[\]])")


def write(runs: list[Run], names: list[str], folder: Path) -> list[Path]:
    """Writes report.csv, report.parquet and report.md into the folder. Returns their paths.

    Seconds are seconds, bytes are bytes, and nothing is rounded, but for the Markdown. An absent value is an empty cell
    of CSV, a null of Parquet, and a dash in Markdown.
    """
    frame = polars.DataFrame([_series(column.name, [run.row[column.name] for run in runs]) for column in COLUMNS])
    csv, parquet, markdown = (folder / f"report.{ending}" for ending in ("csv", "parquet", "md"))
    frame.write_csv(csv)
    frame.write_parquet(parquet)
    markdown.write_text(_markdown(runs, names), encoding="utf-8")
    return [csv, parquet, markdown]


def _series(name: str, values: list[Scalar]) -> polars.Series:
    """A column of the one type that all its values have."""
    kinds = set(map(type, values)) - {type(None)}
    if kinds == {bool}:
        return polars.Series(name, values, dtype=polars.Boolean)
    if kinds == {int} and all(value is None or abs(int(value)) < 2**63 for value in values):
        return polars.Series(name, values, dtype=polars.Int64)
    if kinds and kinds <= {int, float}:
        return polars.Series(name, [None if value is None else float(value) for value in values], dtype=polars.Float64)
    return polars.Series(name, [None if value is None else str(value) for value in values], dtype=polars.String)


def _markdown(runs: list[Run], names: list[str]) -> str:
    shown = [each for each in COLUMNS if each.is_shown and any(run.row[each.name] is not None for run in runs)]
    lines = [
        _line(["run", *(column.label for column in shown)]),
        _line(["---", *("---:" if column.unit else "---" for column in shown)]),
    ]
    for name, run in zip(names, runs, strict=True):
        cells = (formats.text(run.row[each.name], each.unit) for each in shown)
        lines.append(_line([name, *cells]))
    failed = [
        f"{name}: {run.row['status']}, {run.row['error'] or 'no reason is known'}"
        for name, run in zip(names, runs, strict=True)
        if run.row["status"] != "ok"
    ]
    if failed:
        lines += ["", "Runs that are not ok:", "", *(f"- {_escaped(text)}" for text in failed)]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    """A row; what its cells have of Markdown's own characters stays text, also where it would end a cell."""
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    return " ".join(_MARKUP.sub(r"\\\1", text).split())
