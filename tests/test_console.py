import io

from rich.console import Console

from zi_experiments.record import Record, RunInfo
from zi_experiments.sinks.console import show_plan, show_sweep


def record(status):
    run = RunInfo(id="1", name="one", group=None, started_at="", finished_at="", command="", git_revision=None)
    return Record(run=run, folder="", choices={}, config={}, status=status)


def test_a_sweep_shows_what_differs_and_brackets_as_they_were_typed(capsys):
    common = "tracking.tags=[same]"

    show_sweep([([common, "tracking.tags=[a,b]"], record("ok")), ([common, "name=[/x]"], record("oom"))])

    shown = capsys.readouterr().out
    assert "tracking.tags=[a,b]" in shown
    assert "name=[/x]" in shown
    assert "oom" in shown
    assert "same" not in shown


def test_a_plan_shows_a_name_as_it_was_typed(make_plan, machine):
    console = Console(file=io.StringIO(), width=200)

    show_plan("[/mine]", make_plan("model=opt-125m", on=machine("cpu")), console)

    assert console.file.getvalue().startswith("[/mine]: 125.2 M parameters")
