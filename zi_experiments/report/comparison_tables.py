"""A comparison as people read it on a console."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zi_experiments import lines
from zi_experiments.report import formats
from zi_experiments.report.comparison import Comparison, Differences, Figure, Pair, shared
from zi_experiments.report.intervals import ENOUGH_PASSES
from zi_experiments.report.runs import PLANNED

# what more of a figure is: better, worse, or neither
_BETTER_UP = ("tok_per_s", "tok_per_s_per_user", "fraction_of_bound")
_BETTER_DOWN = ("ttft_s", "tpot_p50_s", "tpot_p90_s", "tpot_p99_s", "cost_per_million_tokens")
_PLANNED = {"predicted": "predicted", "bound": "limits, since not all rates are measured"}
_TITLES = ("settings that differ", "environment that differs")


def show(comparison: Comparison, console: Console) -> None:
    """Every figure of every pair, what else differs, and for several pairs a table of their decode throughput."""
    pairs = comparison.pairs
    if len(pairs) == 1:
        for name, run in (("A", pairs[0].before), ("B", pairs[0].after)):
            lines.say(f"{name}: {run.row['name']} ({run.source})", console)
    same = [shared(pair.settings for pair in pairs), shared(pair.environment for pair in pairs)]
    for title, differences in zip(_TITLES, same, strict=True):
        _show_differences(title + (" in every pair" if len(pairs) > 1 else ""), differences, console)
    for pair in pairs:
        console.print(_figures(pair))
        _say_failures(pair, console)
        for title, differences, known in zip(_TITLES, (pair.settings, pair.environment), same, strict=True):
            rest = {key: values for key, values in differences.items() if key not in known}
            if rest:
                _show_differences(f"{title} in this pair", rest, console)
    if len(pairs) > 1:
        console.print(_summary(pairs))
    for name, runs in (("A", comparison.only_before), ("B", comparison.only_after)):
        for run in runs:
            lines.say(f"only in {name}: {run.row['name']} ({run.source})", console)
    if any(_is_without_verdict(figure) for pair in pairs for figure in pair.figures):
        lines.say(
            f"a range is that of the passes: with fewer than {ENOUGH_PASSES} of them there is no verdict", console
        )


def _figures(pair: Pair) -> Table:
    table = Table(title=escape(pair.name) or None, title_justify="left", width=80)
    table.add_column("figure", ratio=1)
    for header in ("A", "B", "B / A", "95 % or range"):
        table.add_column(header, justify="right")
    table.add_column("verdict")
    for figure in pair.figures:
        if figure.before is not None or figure.after is not None:
            cells = (formats.text(value, figure.column.unit) for value in (figure.before, figure.after))
            table.add_row(figure.label, *cells, _ratio(figure), _interval(figure), _verdict(figure))
    return table


def _summary(pairs: tuple[Pair, ...]) -> Table:
    table = Table(title="decode throughput", title_justify="left", width=80)
    table.add_column("run", ratio=1, overflow="fold")
    for header in ("A", "B", "B / A", "95 % or range"):
        table.add_column(header, justify="right")
    table.add_column("verdict")
    for pair in pairs:
        cells = (
            formats.text(value, "tok/s") if value is not None else str(run.row["status"])
            for run, value in ((pair.before, pair.decode.before), (pair.after, pair.decode.after))
        )
        table.add_row(escape(pair.name), *cells, _ratio(pair.decode), _interval(pair.decode), _verdict(pair.decode))
    return table


def _ratio(figure: Figure) -> str:
    return "" if figure.ratio is None else f"{figure.ratio:.3f}"


def _interval(figure: Figure) -> str:
    return "" if figure.interval is None else f"{figure.interval.low:.3f} to {figure.interval.high:.3f}"


def _verdict(figure: Figure) -> str:
    if figure.interval is None or figure.ratio is None or figure.interval.differs is None:
        return ""
    if not figure.interval.differs:
        return "noise"
    is_more = figure.interval.low > 1
    name = figure.column.name
    if name.endswith(_BETTER_UP):
        return "[green]better" if is_more else "[red]worse"
    if name in _BETTER_DOWN:
        return "[red]worse" if is_more else "[green]better"
    return "more" if is_more else "less"


def _is_without_verdict(figure: Figure) -> bool:
    return figure.interval is not None and figure.interval.differs is None


def _say_failures(pair: Pair, console: Console) -> None:
    for name, run in (("A", pair.before), ("B", pair.after)):
        if run.row["status"] in PLANNED:
            lines.say(f"{name} is a plan: its figures are {_PLANNED[str(run.row['status'])]}", console)
        elif run.row["status"] != "ok":
            lines.say(f"{name} is {run.row['status']}: {run.row['error'] or 'no reason is known'}", console)


def _show_differences(title: str, differences: Differences, console: Console) -> None:
    if not differences:
        lines.say(f"no {title}", console)
        return
    table = Table(title=title, title_justify="left", width=80)
    for header in ("", "A", "B"):
        table.add_column(header, overflow="fold")
    for key, values in differences.items():
        table.add_row(escape(key), *(escape(formats.absent(value)) for value in values))
    console.print(table)
