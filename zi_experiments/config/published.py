"""What an experiment asks; published figures, and which of them are of the same kind as a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ALIKE = ("model", "engine", "offload", "quant")  # groups whose choices have to be equal

_KEYS = (("system", str, "FlexGen"), ("value", int | float, "7.3"), ("batch", int, "8"), ("run", str, "model=opt-30b"))


@dataclass
class Question:
    """What an experiment asks; its runs answer it together."""

    text: str
    figures: list[str]  # names of figures in `metrics`: the first one answers, the others explain


@dataclass
class Published:
    """A published table of throughputs, shown beside runs with the same model, engine, offload and quantization."""

    title: str
    machine: str
    source: str
    about: str
    figure: str  # the figure in `metrics` that its values are
    run: list[str]  # overrides of all rows
    systems: dict[str, str]  # overrides of the rows of each system
    rows: list[
        dict[str, Any]
    ]  # system, value, batch, run (overrides); where known kv (the place of the KV cache), note


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    system: str
    value: float
    batch: int  # sequences
    kv: str | None  # where the KV cache was, if not on the GPU
    note: str
    settings: dict[str, str]  # overrides, by group or by dotted name


def problem(table: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the rows of a table of the schema, in one line; None: nothing."""
    for number, row in enumerate(table["rows"]):
        name = f"published.rows[{number}]"
        for key, kind, example in _KEYS:
            if not isinstance(row.get(key), kind):
                return f"{name}.{key} is missing or of another type: write {key}: {example}"
        if not row["batch"] > 0:
            return f"{name}.batch={row['batch']} is not a number of sequences: write batch: 8"
        if row["system"] not in table["systems"]:
            return (
                f"{name}.system={row['system']} is not in published.systems: write it there, with what to type for it"
            )
        if words := [word for word in _typed(row, table) if "=" not in word]:
            return f"{name}: {words[0]} is not GROUP=CHOICE or KEY=VALUE: write model=opt-30b, for example"
    return None


def rows(table: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a table; an override of a row has priority over one of its system, and that over the table's."""
    return [_row(row, table) for row in table["rows"]]


def is_alike(row: Row, settings: Mapping[str, Any]) -> bool:
    """Return whether a row has the model, engine, offload target and quantization of a run with these settings."""
    return all(row.settings.get(group) == settings.get(group) for group in _ALIKE)


def _row(row: Mapping[str, Any], table: Mapping[str, Any]) -> Row:
    return Row(
        system=row["system"],
        value=row["value"],
        batch=row["batch"],
        kv=row.get("kv"),
        note=row.get("note", ""),
        settings=dict(each.split("=", 1) for each in _typed(row, table)),
    )


def _typed(row: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    return [*table["run"], *table["systems"][row["system"]].split(), *row["run"].split()]
