"""The saved view: a section for each chart of the report, and a comparison of runs.

A bar chart of W&B has one grouping, so a chart that has several is several panels.
"""

from typing import Any

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces.workspaces import internal

from zi_experiments.config.schema import ConfigError
from zi_experiments.quoting import reason
from zi_experiments.report.charts import CHARTS, Chart
from zi_experiments.report.columns import COLUMNS, Column

TITLE = "zi_experiments"
_NAME = "zidashboard"  # in the address; always the same, so that there is one view
_PINNED = ("status", "phase", "phase_done", "decode_tok_per_s", "fraction_of_bound", "error_type", "error", "hint")
_MOST_RUNS = 100
_COLUMNS = {column.name: column for column in COLUMNS}


def save(project: str, entity: str | None) -> str:
    """Make the view in a project, or replace it. Return its address. Raises `ConfigError` if W&B does not take it."""
    try:
        view = workspace(project, entity or wandb.Api().default_entity or "")
        view._internal_name, view._internal_id = f"nw-{_NAME}-v", _saved_id(view)
        return str(view.save().url)
    except Exception as error:  # W&B's client raises many kinds: of its own, of HTTP, of the project
        raise ConfigError(f"W&B has not taken the view: {reason(error)}") from error


def text(project: str) -> str:
    """Return the JSON of the view in the form in which W&B stores it."""
    return str(workspace(project, "")._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=2))


def workspace(project: str, entity: str) -> ws.Workspace:
    """Return the view of a project, not saved."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=[
            *(
                _section(chart.title, [*_panels(chart), wr.MarkdownPanel(markdown=chart.definition)])
                for chart in CHARTS
            ),
            _section("Runs compared", [wr.RunComparer(diff_only="split")]),
        ],
        settings=ws.WorkspaceSettings(max_runs=_MOST_RUNS),
        runset_settings=ws.RunsetSettings(pinned_columns=[f"summary:{key}" for key in _PINNED]),
    )


def _saved_id(view: ws.Workspace) -> str:
    """Return W&B's id of the view that was saved before; "" without one."""
    try:
        return str(internal.get_view_dict(view.entity, view.project, _NAME)["id"])
    except ValueError as error:
        if str(error).startswith("Project"):
            raise ValueError(
                f"{view.entity} has no project {view.project}: pass --project and --entity of one that has runs"
            ) from error
        return ""


def _section(name: str, panels: list[Any]) -> ws.Section:
    columns = min(3, len(panels))
    layout = ws.SectionLayoutSettings(columns=columns, rows=-(-len(panels) // columns))
    return ws.Section(name=name, panels=panels, is_open=True, layout_settings=layout)


def _panels(chart: Chart) -> list[Any]:
    """Return what shows a chart in W&B, without its definition."""
    figures = [_COLUMNS[name] for name in chart.y]
    match chart.kind:
        case "fastest":
            return [_fastest(figures[0], _COLUMNS[name]) for name in chart.by]
        case "points" | "frontier":
            assert chart.x is not None
            x, y = _value(_COLUMNS[chart.x]), _value(figures[0])
            return [wr.ScatterPlot(title=chart.title, x=x, y=y, log_x=True, log_y=True)]
        case "timelines":
            return [wr.LinePlot(title=chart.title, x="timeline/step", y=["timeline/tpot_s"], log_y=True)]
        case "bars":
            return [wr.BarPlot(title=chart.title, metrics=[figure.name for figure in figures])]
        case "answer":  # of a page's own runs
            return []
        case "failures":
            by = wr.Config("outcome")
            return [wr.BarPlot(title=chart.title, metrics=["failed"], groupby=by, groupby_aggfunc="sum")]


def _fastest(figure: Column, by: Column) -> wr.BarPlot:
    """Return the largest value of a figure among the runs of each group."""
    title = f"{figure.label} of the fastest, by {by.label}"
    return wr.BarPlot(title=title, metrics=[figure.name], groupby=_value(by), groupby_aggfunc="max")


def _value(column: Column) -> Any:
    """Return where W&B has the value of a column: figures in the summary, settings and plan in the configuration."""
    match column.places[0]:
        case ("metrics", str(name)):
            return wr.SummaryMetric(name)
        case ("settings", str(name)):
            return wr.Config(name if "." in name else f"choices.{name}")
        case path:
            return wr.Config(".".join(map(str, path)))
