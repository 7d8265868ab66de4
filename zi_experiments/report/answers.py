"""Answers to the questions of experiments: the figures of the runs of a sweep, beside published ones."""

from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

from zi_experiments.config import published
from zi_experiments.config.published import Row
from zi_experiments.report.columns import COLUMNS, Column
from zi_experiments.report.comparison import number
from zi_experiments.report.runs import Run, differing, labels

# what a search decides, where no override tells
_DECIDED = ("workload.batch_size", "workload.micro_batches", "kv_cache.device", "offload.resident")
_COLUMNS = {column.name: column for column in COLUMNS}


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A run of a sweep; a value that it does not have is None."""

    run: Run
    varied: dict[str, str]  # what tells it from the other runs, by setting
    values: tuple[float | None, ...]  # of the figures of the answer
    ratio: float | None  # of its first figure to that of the first run that has one
    published: tuple[Row, ...]  # of the same model, engine, offload and quantization; each once, by the nearest batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    question: str
    figures: tuple[Column, ...]
    lines: tuple[Line, ...]
    source: str | None  # of the published figures beside the runs: title, machine and address; None: there are none
    about: str  # how the published figures were measured; empty: there are none
    published_figure: Column | None  # which of the figures of a run the published ones are


def of(runs: list[Run]) -> list[Answer]:
    """The answer of each sweep whose runs have a question, in the order of the runs."""
    groups: dict[tuple[str, Path], list[Run]] = {}
    for run in runs:
        if run.question is not None:
            groups.setdefault((run.question["text"], Path(run.source).parent.parent), []).append(run)
    return [_answer(members) for members in groups.values()]


def _answer(runs: list[Run]) -> Answer:
    question, table = runs[0].question, runs[0].published
    assert question is not None
    figures = tuple(_COLUMNS[name] for name in question["figures"] if name in _COLUMNS)
    values = [tuple(number(run, column.name) for column in figures) for run in runs]
    base = next((each[0] for each in values if each[0]), None)
    beside = _published(runs, table) if table else [()] * len(runs)
    return Answer(
        question=question["text"],
        figures=figures,
        lines=tuple(
            Line(
                run=run,
                varied=telling,
                values=each,
                ratio=each[0] / base if base and each[0] is not None else None,
                published=rows,
            )
            for run, telling, each, rows in zip(runs, varied(runs), values, beside, strict=True)
        ),
        source=f"{table['title']}, on {table['machine']}: {table['source']}" if table and any(beside) else None,
        about=str(table.get("about", "")) if table and any(beside) else "",
        published_figure=_COLUMNS.get(table["figure"]) if table and any(beside) else None,
    )


def _published(runs: list[Run], table: dict[str, Any]) -> list[tuple[Row, ...]]:
    """Return for each run the published rows of its kind whose batch is nearer to its own than to any other's."""
    beside: list[tuple[Row, ...]] = [()] * len(runs)
    for row in published.rows(table):
        alike = [n for n, run in enumerate(runs) if published.is_alike(row, run.settings)]
        if alike:
            nearest = min(alike, key=lambda n: abs(log(row.batch / (number(runs[n], "sequences") or row.batch))))
            beside[nearest] += (row,)
    return beside


def varied(runs: list[Run]) -> list[dict[str, str]]:
    """Return what tells the runs of a sweep apart, by setting: what was typed, or what a search has decided.

    All have the same settings. Runs that nothing tells apart have a label as their `run`.
    """
    if any(run.settings.get("search.rank") is not None for run in runs):
        keys = [key for key in _DECIDED if len({run.settings.get(key) for run in runs}) > 1]
        return [{key: str(run.settings.get(key)) for key in keys} for run in runs]
    found = [dict(each.lstrip("+").split("=", 1) for each in parts) for parts in differing(runs)]
    keys = list(dict.fromkeys(key for each in found for key in each))
    if not keys:
        return [{"run": label} for label in labels(runs)]
    return [{key: each.get(key, "") for key in keys} for each in found]


def short(key: str) -> str:
    """Return the last part of a setting's name, or the group where that is a word that several groups have."""
    group, _, last = key.rpartition(".")
    return group if last in ("device", "name", "path", "source") else last


def text_of(row: Row) -> str:
    """What a published figure was measured with."""
    kv = f", KV cache: {row.kv}" if row.kv else ""
    return f"{row.system}, batch {row.batch}{kv}" + (f", {row.note}" if row.note else "")
