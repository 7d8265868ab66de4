"""Two runs, or two sets of runs, against each other: which belong together, ratios of figures, what else differs."""

from collections.abc import Iterable
from dataclasses import dataclass

from zi_experiments.config.schema import ConfigError
from zi_experiments.report import intervals
from zi_experiments.report.columns import COLUMNS, Column, Scalar
from zi_experiments.report.intervals import Interval
from zi_experiments.report.runs import GROUPS, Run

DECODE = "decode_tok_per_s"
# the figures of `metrics`, in the order of their columns; what a run is asked for is no figure
FIGURES = [column for column in COLUMNS if column.places == (("metrics", column.name),)]
_PREDICTIONS = {
    "decode_prediction_error": "decode, predicted / actual",
    "prefill_prediction_error": "prefill, predicted / actual",
}

Differences = dict[str, tuple[Scalar, Scalar]]  # by dotted name: before and after


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A figure of two runs; a value that a run does not have is None, and so are ratio and interval then."""

    column: Column
    label: str
    before: float | None
    after: float | None
    ratio: float | None  # after / before
    interval: Interval | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    name: str  # what the two runs share and others of their sets do not; empty for a single pair
    before: Run
    after: Run
    figures: tuple[Figure, ...]
    settings: Differences
    environment: Differences

    @property
    def decode(self) -> Figure:
        return next(figure for figure in self.figures if figure.column.name == DECODE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    pairs: tuple[Pair, ...]
    only_before: tuple[Run, ...]  # runs without a partner
    only_after: tuple[Run, ...]


def compare(before: list[Run], after: list[Run]) -> Comparison:
    """All pairs of runs that belong together. Two single runs always do.

    Runs of sweeps do when they have the same name, if no two runs of one sweep have. Otherwise the settings decide that vary
    within a sweep; of runs with the same ones the last counts. Raises ConfigError when no two runs belong together.
    """
    if len(before) == len(after) == 1:
        return Comparison(pairs=(_pair("", before[0], after[0]),), only_before=(), only_after=())
    first, second = _by_name(before), _by_name(after)
    if len(first) < len(before) or len(second) < len(after) or not first.keys() & second.keys():
        first, second = _by_settings(before, after)
    shared = [name for name in first if name in second]
    if not shared:
        raise ConfigError(
            "no run of A has the settings of a run of B: name two runs, or two sweeps of the same settings"
        )
    return Comparison(
        pairs=tuple(_pair(name, first[name], second[name]) for name in shared),
        only_before=tuple(run for name, run in first.items() if name not in second),
        only_after=tuple(run for name, run in second.items() if name not in first),
    )


def _by_name(runs: list[Run]) -> dict[str, Run]:
    return {str(run.row["name"]): run for run in runs}


def _by_settings(before: list[Run], after: list[Run]) -> tuple[dict[str, Run], dict[str, Run]]:
    """The runs by the settings that decide, as text. What was typed decides, unless that is the same for several runs."""
    everything = sorted({key for run in (*before, *after) for key in run.settings})
    typed = {key for run in (*before, *after) for key in _typed(run)}
    for keys in ([key for key in everything if key in typed or key in GROUPS], everything):
        telling = [key for key in keys if _is_telling(key, before, after)]
        first, second = ({_identity(run, telling): run for run in runs} for runs in (before, after))
        if len(first) == len(before) and len(second) == len(after):
            break
    return first, second


def _is_telling(key: str, before: list[Run], after: list[Run]) -> bool:
    """Whether a setting says which runs belong together. Rates of the machine do not."""
    varies = any(len({run.settings.get(key) for run in runs}) > 1 for runs in (before, after))
    return varies and not key.startswith("hardware.ceilings.")


def _identity(run: Run, keys: list[str]) -> str:
    return " ".join(f"{key}={run.settings[key]}" for key in keys if run.settings.get(key) is not None)


def _typed(run: Run) -> set[str]:
    """The settings that a run's command names."""
    words = str(run.row["command"] or "").split()
    return {word.partition("=")[0].lstrip("+~") for word in words if "=" in word}


def _pair(name: str, before: Run, after: Run) -> Pair:
    return Pair(
        name=name,
        before=before,
        after=after,
        figures=tuple(_figure(column, before, after) for column in FIGURES),
        settings=_settings(before, after),
        environment=_differences(before.environment, after.environment),
    )


def _figure(column: Column, before: Run, after: Run) -> Figure:
    # an error has no ratio, since it is about zero: what was predicted over what was measured has
    shift = 1 if column.name in _PREDICTIONS else 0
    values = [
        None if value is None else value + shift for value in (number(run, column.name) for run in (before, after))
    ]
    first, second = values
    ratio = second / first if first and second is not None else None
    return Figure(
        column=column,
        label=_PREDICTIONS.get(column.name, column.label),
        before=first,
        after=second,
        ratio=ratio,
        interval=intervals.of_ratio(column.name, before, after, ratio) if ratio else None,
    )


def number(run: Run, name: str) -> float | None:
    """The value of a run in a column of numbers; None where it has none."""
    value = run.row[name]
    return None if isinstance(value, str) or value is None else float(value)


def _settings(before: Run, after: Run) -> Differences:
    """Settings that differ; `engine.name` is no news where `engine` differs."""
    found = _differences(before.settings, after.settings)
    repeated = {f"{group}.name" for group in found}
    return {key: values for key, values in found.items() if key not in repeated}


def _differences(before: dict[str, Scalar], after: dict[str, Scalar]) -> Differences:
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def shared(differences: Iterable[Differences]) -> Differences:
    """What differs in the same way in all of them."""
    first, *others = differences
    return {key: values for key, values in first.items() if all(each.get(key) == values for each in others)}
