import io
from dataclasses import replace

import pytest
from rich.console import Console

from zi_experiments import zero3
from zi_experiments.record import Record, RunInfo
from zi_experiments.sinks.console import show_plan, show_sweep


def record(status):
    run = RunInfo(id="1", name="one", group=None, started_at="", finished_at="", command="", git_revision=None)
    return Record(run=run, folder="", choices={}, config={}, status=status).to_dict()


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


def shown(plan):
    """What is shown of a plan on a terminal, with its colours."""
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    show_plan("run", plan, console)
    return console.file.getvalue()


YELLOW, RESET = "\x1b[33m", "\x1b[0m"


def with_fewer_quantizable(plan, keep):
    """The plan of a model of which only parameters that `keep` accepts can be quantized."""
    parameters = tuple(replace(p, quantizable=p.quantizable and keep(p)) for p in plan.architecture.parameters)
    changed = replace(plan, architecture=replace(plan.architecture, parameters=parameters))
    return replace(changed, stored=zero3.storage(changed))


def test_a_plan_says_how_much_is_quantized_and_what_it_takes(make_plan):
    text = shown(make_plan("model=opt-125m", "quant=int4"))

    assert "99 % of the parameters quantized to 4 bits; 4.66 bits a parameter as stored\n" in text
    assert "warning" not in text
    assert YELLOW not in text


def test_a_plan_warns_where_much_stays_16_bit(make_plan):
    plan = with_fewer_quantizable(make_plan("model=opt-125m", "quant=int4"), lambda p: p.layer is not None)

    # 12·12·768² of 125.2 M
    expected = "warning: only 68 % of the parameters quantized to 4 bits; 8.20 bits a parameter as stored"
    assert f"{YELLOW}{expected}{RESET}\n" in shown(plan)


@pytest.mark.parametrize(("left_alone", "warns"), [(3, False), (4, True)])  # layers of 40: 90.6 % and 88.1 %
def test_it_warns_below_nine_tenths(make_plan, left_alone, warns):
    plan = with_fewer_quantizable(
        make_plan("model=opt-13b", "quant=int8"), lambda p: p.layer is not None and p.layer >= left_alone
    )

    assert ("warning: only" in shown(plan)) is warns


def test_a_16_bit_plan_says_nothing_of_quantization(make_plan):
    text = shown(make_plan("model=opt-125m", "quant=fp16"))

    assert "quantized" not in text
    assert "bits a parameter" not in text
