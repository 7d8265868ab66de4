"""The runs as tables for other programs: CSV and Parquet with all columns, Markdown with those that the page shows."""

import re
from collections.abc import Iterable
from pathlib import Path

import polars

from zi_experiments.report import formats
from zi_experiments.report.columns import COLUMNS, Scalar
from zi_experiments.report.runs import PLANNED, Run, by_column

_MARKUP = re.compile(r"([\\|<>*_`\[\]])")


def write(runs: list[Run], names: list[str], folder: Path) -> list[Path]:
    """Writes report.csv, report.parquet and report.md into the folder. Returns their paths.

    Seconds are seconds, bytes are bytes, and nothing is rounded, but for the Markdown. An absent value is an empty cell
    of CSV, a null of Parquet, and a dash in Markdown.
    """
    frame = polars.DataFrame([_series(name, values) for name, values in by_column(runs).items()])
    csv, parquet, markdown = (folder / f"report.{ending}" for ending in ("csv", "parquet", "md"))
    frame.write_csv(csv)
    frame.write_parquet(parquet)
    markdown.write_text(_markdown(runs, names), encoding="utf-8")
    return [csv, parquet, markdown]


def _series(name: str, values: tuple[Scalar, ...]) -> polars.Series:
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
    values = by_column(runs)
    shown = [each for each in COLUMNS if each.is_shown and set(values[each.name]) != {None}]
    cells = [[_escaped(name) for name in names], *(_cells(values[each.name], each.unit) for each in shown)]
    lines = [
        _line(["run", *(column.label for column in shown)]),
        _line(["---", *("---:" if column.unit else "---" for column in shown)]),
        *map(_line, zip(*cells, strict=True)),
    ]
    failed = [
        f"{name}: {run.row['status']}, {run.row['error'] or 'no reason is known'}"
        for name, run in zip(names, runs, strict=True)
        if run.row["status"] not in ("ok", *PLANNED)
    ]
    if failed:
        lines += ["", "Runs that are not ok:", "", *(f"- {_escaped(text)}" for text in failed)]
    return "\n".join(lines) + "\n"


def _cells(values: tuple[Scalar, ...], unit: str) -> list[str]:
    texts = {value: _escaped(formats.text(value, unit)) for value in set(values)}
    return [texts[value] for value in values]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Text whose characters of Markdown stay text, also where they would end a cell."""
    return " ".join(_MARKUP.sub(r"\\\1", text).split())
