"""An answer as people read it on a console."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zi_experiments import lines
from zi_experiments.report import formats
from zi_experiments.report.answers import Answer, Line, short, text_of


def show(answer: Answer, console: Console) -> None:
    """Print the runs of an answer, beside each the published figures of its kind, and where those are from."""
    first, *others = answer.figures
    table = Table(title=escape(answer.question))
    for key in answer.lines[0].varied:
        table.add_column(escape(short(key)), overflow="fold")
    table.add_column(first.label, justify="right")
    table.add_column("× first", justify="right")
    for column in others:
        table.add_column(column.label, justify="right")
    if answer.published_figure:
        table.add_column(f"published {answer.published_figure.label}", justify="right")
    for line in answer.lines:
        published = [" ".join(f"{row.value:g}" for row in line.published)] if answer.published_figure else []
        table.add_row(*map(escape, line.varied.values()), *_figures(answer, line), *published)
    console.print(table)
    for row in (row for line in answer.lines for row in line.published):
        lines.say(f"published {row.value:g}: {text_of(row)}", console)
    if answer.source:
        lines.say(f"published in {answer.source}", console)


def _figures(answer: Answer, line: Line) -> list[str]:
    status = str(line.run.row["status"])
    if all(value is None for value in line.values):
        return [escape(status), *[""] * len(answer.figures)]
    first, *others = (
        formats.text(value, column.unit) for value, column in zip(line.values, answer.figures, strict=True)
    )
    ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
    return [first, ratio, *others]
