"""Answers as the page has them: a table, and a chart of each figure with the published values between the runs."""

from dataclasses import dataclass

from zi_experiments.report import answers, formats
from zi_experiments.report.answers import Answer, Line, short, text_of
from zi_experiments.report.charts import Bar, Chart
from zi_experiments.report.columns import Column
from zi_experiments.report.runs import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    question: str
    headers: list[str]
    rows: list[list[str]]
    source: str | None
    charts: list[Chart]


def sections(runs: list[Run]) -> list[Section]:
    """The answers of all runs of a report, whose numbers are those of the list."""
    numbers = {id(run): number for number, run in enumerate(runs)}
    return [_section(answer, count, numbers) for count, answer in enumerate(answers.of(runs))]


def _section(answer: Answer, count: int, numbers: dict[int, int]) -> Section:
    first, *others = answer.figures
    published = [f"published {answer.published_figure.label}"] if answer.published_figure else []
    keys = [short(key) for key in answer.lines[0].varied]
    return Section(
        question=answer.question,
        headers=[*keys, "status", first.label, "× first", *(column.label for column in others), *published],
        rows=[_row(answer, line) for line in answer.lines],
        source=answer.source,
        charts=[_chart(answer, count, column, numbers) for column in answer.figures],
    )


def _row(answer: Answer, line: Line) -> list[str]:
    texts = [formats.text(value, column.unit) for value, column in zip(line.values, answer.figures, strict=True)]
    ratio = formats.absent(None) if line.ratio is None else f"{line.ratio:.2f}"
    published = "; ".join(f"{row.value:g} {text_of(row)}" for row in line.published) or formats.absent(None)
    cells = [*line.varied.values(), str(line.run.row["status"]), texts[0], ratio, *texts[1:]]
    return [*cells, published] if answer.published_figure else cells


def _chart(answer: Answer, count: int, column: Column, numbers: dict[int, int]) -> Chart:
    bars = list[Bar]()
    for line in answer.lines:
        bars.append(Bar(name=_name(line), run=numbers[id(line.run)]))
        if column == answer.published_figure:
            bars += [Bar(name=text_of(row), value=row.value) for row in line.published]
    return Chart(
        id=f"answer-{count}-{column.name}",
        title=column.label,
        kind="answer",
        y=(column.name,),
        bars=tuple(bars),
        definition=f"Published: {answer.source} {answer.about}" if any(bar.run is None for bar in bars) else "",
    )


def _name(line: Line) -> str:
    """A name for a bar: values, and what numbers are of."""
    parts = ((short(key), value) for key, value in line.varied.items())
    return " ".join(value if value[:1].isalpha() else f"{key}={value}" for key, value in parts)
