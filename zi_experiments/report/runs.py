"""A finished run as reports see it: figures by column, settings and environment by dotted name, raw times."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from zi_experiments.config import folders, published
from zi_experiments.report.columns import COLUMNS, Column, Path, Scalar
from zi_experiments.system.machines import is_gpu

GROUPS = ("model", "engine", "offload", "quant", "kv_cache", "weights", "workload", "hardware", "experiment")
PLANNED = ("predicted", "bound")  # statuses of plans, whose figures are not measured
# what tells runs of one name apart, the most telling first
_TELLING = (
    "model",
    "engine",
    "profile",
    "offload",
    "quant",
    "kv_cache",
    "sequences",
    "prompt_len",
    "gen_len",
    "machine",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Raw times of the measured passes, in seconds; empty where the record has none."""

    ttft_s: list[float]
    total_s: list[float]
    step_s: list[list[float]]  # of each pass, its G − 1 decode steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    source: str  # the file, as one would type it
    row: dict[str, Scalar]  # by column; None where the record has no value
    settings: dict[str, Scalar]  # choices by group (`engine`), values by dotted name (`engine.profile`)
    environment: dict[str, Scalar]
    passes: Passes
    overrides: tuple[str, ...] = ()  # of this run alone, as typed; those that do not affect it are left out
    question: dict[str, Any] | None = None  # as in the record
    published: dict[str, Any] | None = None


def from_record(record: dict[str, Any], source: str) -> Run:
    """The run of a record in its JSON form. What is missing or of another type than it should be is absent."""
    choices, config = _dict(record, "choices"), _dict(record, "config")
    settings = flat(folders.telling(config))
    settings |= {group: _scalar(choices[group]) for group in GROUPS if group in choices}
    environment = flat(_dict(record, "environment"))
    samples = _dict(record, "samples")
    passes = Passes(
        ttft_s=_numbers(samples.get("ttft_s")),
        total_s=_numbers(samples.get("total_s")),
        step_s=[_numbers(steps) for steps in _list(samples.get("step_s"))],
    )
    content = record | {"settings": settings}
    row = _row(content)
    row |= _derived(row, settings, environment, passes) | _planned_totals(record) | {"source": source}
    if row["status"] in PLANNED:
        row |= _planned_figures(row, "predicted" if row["status"] == "predicted" else "bound")
    overrides = map(str, _list(_dict(record, "run").get("overrides")))
    return Run(
        source=source,
        row=row,
        settings=settings,
        environment=environment,
        passes=passes,
        overrides=tuple(each for each in overrides if folders.is_telling(each)),
        question=_question(record),
        published=_published(record),
    )


def _question(record: dict[str, Any]) -> dict[str, Any] | None:
    """The question of a record if it can be answered; a refused run may have any."""
    question = _dict(record, "question")
    known = {column.name for column in COLUMNS}.intersection(map(str, _list(question.get("figures"))))
    return question if known and isinstance(question.get("text"), str) else None


def _published(record: dict[str, Any]) -> dict[str, Any] | None:
    table = _dict(record, "published")
    try:
        is_whole = {"title", "machine", "source", "figure"} <= table.keys() and published.problem(table) is None
    except (KeyError, TypeError, AttributeError):
        return None
    return table if is_whole else None


def flat(nested: dict[str, Any]) -> dict[str, Scalar]:
    """Values of nested dictionaries by dotted name; a list is its text."""
    values: dict[str, Scalar] = {}
    _flatten(nested, "", values)
    return values


def _flatten(nested: dict[str, Any], prefix: str, values: dict[str, Scalar]) -> None:
    for key, value in nested.items():
        if type(value) is dict:
            _flatten(value, f"{prefix}{key}.", values)
        else:
            values[prefix + key] = value if value is None or type(value) is int else _scalar(value)


def by_column(runs: list[Run]) -> dict[str, tuple[Scalar, ...]]:
    """The values of all runs in each column, in the order of the columns."""
    names = [column.name for column in COLUMNS]
    return dict(zip(names, zip(*(run.row.values() for run in runs), strict=True), strict=True))


def labels(runs: list[Run]) -> list[str]:
    """A name for each run: its own, with what tells it apart from others of that name."""
    groups: dict[Scalar, list[int]] = {}
    for number, run in enumerate(runs):
        groups.setdefault(run.row["name"], []).append(number)
    names = [""] * len(runs)
    for name, members in groups.items():
        rows = [_telling(runs[member]) for member in members]
        varied = _distinguishing(rows)
        same: dict[str, list[int]] = {}
        for member, row in zip(members, rows, strict=True):
            new = [_text(key, row[key]) for key in varied if row.get(key) is not None]
            text = " ".join([str(name or "unnamed"), *(part for part in new if part not in str(name))])
            same.setdefault(text, []).append(member)
        for text, alike in same.items():
            seen: dict[str, int] = {}
            for member, parts in zip(alike, differing([runs[each] for each in alike]), strict=True):
                full = " ".join([text, *parts])
                seen[full] = seen.get(full, 0) + 1
                names[member] = full if seen[full] == 1 else f"{full} #{seen[full]}"
    return names


def differing(runs: list[Run]) -> list[list[str]]:
    """The overrides of each run that not all of the runs have."""
    shared = set(runs[0].overrides).intersection(*(run.overrides for run in runs))
    return [[each for each in run.overrides if each not in shared] for run in runs]


def _distinguishing(rows: list[dict[str, Scalar]]) -> list[str]:
    """The columns that tell rows apart, none that only repeats what those before it tell."""
    chosen, known = list[str](), 1
    for key in _TELLING:
        apart = len({tuple(row.get(each) for each in (*chosen, key)) for row in rows})
        if apart > known:
            chosen, known = [*chosen, key], apart
    return chosen


def _telling(run: Run) -> dict[str, Scalar]:
    return run.row | {"profile": run.settings.get("engine.profile")}


def _text(key: str, value: Scalar) -> str:
    return f"{key}={value}" if isinstance(value, int | float) else str(value)


def _row(content: dict[str, Any]) -> dict[str, Scalar]:
    """The value of each column: that of the first of its places that has one."""
    row: dict[str, Scalar] = dict.fromkeys(column.name for column in COLUMNS)
    for path, wanted in _places():
        parent = _at(content, path)
        if parent is None:
            continue
        for key, column in wanted:
            if row[column.name] is None:
                row[column.name] = _value(parent, key, column)
    return row


@cache
def _places() -> list[tuple[Path, list[tuple[str | int, Column]]]]:
    """The columns by where their values lie, so that each part of a record is looked for once; first places come first."""
    found: dict[tuple[int, Path], list[tuple[str | int, Column]]] = {}
    for column in COLUMNS:
        for rank, path in enumerate(column.places):
            found.setdefault((rank, path[:-1]), []).append((path[-1], column))
    return [(path, wanted) for (_, path), wanted in sorted(found.items(), key=lambda item: item[0][0])]


def _at(content: dict[str, Any], path: Path) -> dict[Any, Any] | None:
    """What lies there, if it has keys; a list has its positions."""
    found: Any = content
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return dict(enumerate(found)) if isinstance(found, list) else found if isinstance(found, dict) else None


def _value(parent: dict[Any, Any], key: str | int, column: Column) -> Scalar:
    value = _scalar(parent.get(key))
    return None if isinstance(value, str | bool) and column.unit else value


def _derived(
    row: dict[str, Scalar], settings: dict[str, Scalar], environment: dict[str, Scalar], passes: Passes
) -> dict[str, Scalar]:
    """Columns that are computed from others."""
    batch_size, micro_batches = row["batch_size"], settings.get("workload.micro_batches") or 1
    sequences = row["sequences"]
    if sequences is None and isinstance(batch_size, int) and isinstance(micro_batches, int):
        sequences = batch_size * micro_batches
    step_s, per_user = row["tpot_p50_s"], row["tok_per_s_per_user"]
    if per_user is None and isinstance(step_s, int | float) and step_s > 0:
        per_user = 1 / step_s  # a record from before it was a metric
    return {
        "machine": _machine(settings, environment),
        "sequences": sequences,
        "passes": len(passes.ttft_s) or None,
        "tok_per_s_per_user": per_user,
    }


def _machine(settings: dict[str, Scalar], environment: dict[str, Scalar]) -> Scalar:
    """The GPU or the processor; of a plan for another machine, the GPU of its hardware choice."""
    found, chosen = environment.get("gpu"), settings.get("hardware.gpu")
    if isinstance(chosen, str) and not (isinstance(found, str) and is_gpu(found, chosen)):
        return chosen
    return found or environment.get("cpu")


def _planned_figures(row: dict[str, Scalar], kind: str) -> dict[str, Scalar]:
    """The figures of a plan, which are predicted, or those of its bound."""
    ttft_s, step_s = _positive(row[f"{kind}_prefill_s"]), _positive(row[f"{kind}_decode_step_s"])
    sequences, prompt_len, gen_len = (_positive(row[name]) for name in ("sequences", "prompt_len", "gen_len"))
    if ttft_s is None or step_s is None or sequences is None or prompt_len is None or gen_len is None:
        return {}
    return {
        "ttft_s": ttft_s,
        "tpot_p50_s": step_s,
        "prefill_tok_per_s": sequences * prompt_len / ttft_s,
        "decode_tok_per_s": sequences / step_s,
        "total_tok_per_s": sequences * gen_len / (ttft_s + (gen_len - 1) * step_s),
        "tok_per_s_per_user": 1 / step_s,
        "load_s": row["predicted_load_s"],
    }


def _positive(value: Scalar) -> float | None:
    return value if isinstance(value, int | float) and value > 0 else None


def _planned_totals(record: dict[str, Any]) -> dict[str, Scalar]:
    """Bytes that the plan takes of each memory, buffers and caches included."""
    totals = {
        use.get("where"): use.get("total")
        for use in _list(_dict(record, "plan").get("memory"))
        if isinstance(use, dict)
    }
    return {f"planned_{where.lower()}_total_bytes": _scalar(totals.get(where)) for where in ("GPU", "host", "disk")}


def _dict(record: dict[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _numbers(values: Any) -> list[float]:
    """A list of finite numbers; empty for anything else."""
    found = _list(values)
    try:
        return found if all(map(math.isfinite, found)) else []
    except TypeError:
        return []


def _scalar(value: Any) -> Scalar:
    kind = type(value)
    if kind is float:
        return float(value) if math.isfinite(value) else None
    if value is None or kind is int or kind is bool:
        return value  # type: ignore[no-any-return]
    text = str(value)
    return text if text.isascii() else text.encode(errors="replace").decode()  # half of a surrogate pair is no text
