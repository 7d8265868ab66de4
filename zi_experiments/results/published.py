"""Published figures: the rows of a table of `conf/published/`, and which of them are of the same kind as a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ALIKE = ("model", "engine", "offload", "quant")  # groups whose choices have to be equal


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    system: str
    value: float
    batch: int  # sequences
    kv: str | None  # where the KV cache was, if not on the GPU
    note: str
    settings: dict[str, str]  # overrides, by group or by dotted name


def rows(table: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a table; an override of a row has priority over one of its system, and that over the table's."""
    return [_row(row, table) for row in table["rows"]]


def is_alike(row: Row, settings: Mapping[str, Any]) -> bool:
    """Return whether a row has the model, engine, offload target and quantization of a run with these settings."""
    return all(row.settings.get(group) == settings.get(group) for group in _ALIKE)


def _row(row: Mapping[str, Any], table: Mapping[str, Any]) -> Row:
    typed = [*table["run"], *table["systems"][row["system"]].split(), *row["run"].split()]
    return Row(
        system=row["system"],
        value=row["value"],
        batch=row["batch"],
        kv=row.get("kv"),
        note=row.get("note", ""),
        settings=dict(each.split("=", 1) for each in typed),
    )
