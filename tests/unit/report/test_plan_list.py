"""Plans: what a report makes of their records, and the table that ends a sweep of them."""

import io

import made_up
import pytest
from rich.console import Console

from zi_experiments.report import comparison, comparison_tables, plan_list, reading, runs, tables


def record(*overrides, status="predicted", batch_size=2, **parts):
    """10 s of prefill and 2 s each step, of 3 generated tokens; bounds are half of that."""
    made = made_up.record(batch_size=batch_size, steps=2, engine="stream") | {
        "status": status,
        "metrics": None,
        "samples": None,
        "verification": None,
        "stored": None,
    }
    made["run"]["overrides"] = list(overrides)
    times = {"prefill_s": 10.0, "decode_step_s": 2.0, "load_s": 30.0, "limited_by": "launch"}
    made["plan"]["prediction"] |= times if status == "predicted" else dict.fromkeys(times)
    made["plan"]["bound"] |= {"prefill_s": 5.0, "decode_step_s": 1.0, "limited_by": "link"}
    return made | parts


def plan(*overrides, **parts):
    return runs.from_record(record(*overrides, **parts), "sweep/0/plan.json")


def refused(*overrides):
    error = {"type": "ConfigError", "message": "it does not fit: pass quant=int4", "hint": None, "traceback": None}
    return plan(*overrides, status="refused", plan=None, error=error)


def text(members, width=80):
    console = Console(file=io.StringIO(), width=width)
    plan_list.show(members, console)
    return console.file.getvalue()


@pytest.mark.parametrize(("status", "share"), [("predicted", 1), ("bound", 0.5)])
def test_figures_of_a_plan_are_its_prediction_or_else_its_bound(status, share):
    row = plan(status=status).row

    assert row["status"] == status
    assert row["ttft_s"] == 10 * share
    assert row["decode_tok_per_s"] == pytest.approx(2 / (2 * share))
    assert row["total_tok_per_s"] == pytest.approx(2 * 3 / (14 * share))
    assert row["prefill_tok_per_s"] == pytest.approx(2 * row["prompt_len"] / (10 * share))


def test_a_failed_run_has_no_figures_of_its_plan():
    assert plan(status="oom").row["decode_tok_per_s"] is None


def test_the_fastest_plan_is_first_and_the_refused_ones_with_their_reasons_last():
    shown = text([refused("quant=fp16"), plan("quant=int8"), plan("quant=int4", batch_size=8)])
    lines = [line for line in shown.splitlines() if line.startswith("│")]

    assert max(map(len, shown.splitlines())) <= 80
    assert [line.split()[1] for line in lines[:3]] == ["int4", "int8", "fp16"]
    assert " 1.71 │" in lines[0]
    assert "launching operations" in lines[0]
    assert "refused: it does not fit" in " ".join(lines[2:]).replace("│", "")
    assert "≤" not in shown


def test_limits_are_marked():
    shown = text([plan("quant=int8", status="bound"), plan("quant=int4")])

    assert "│ int8  │ ≤ 0.86 │   ≥ 1.00 s │ PCIe " in shown
    assert "limits, since not all rates are measured" in shown


def test_plans_of_one_name_are_told_apart_by_what_was_typed():
    pinned = [plan(f"offload.pin_memory={value}", "name=x") for value in ("true", "false")]

    assert [label.removeprefix("opt-125m-cpu-fp16 ") for label in runs.labels(pinned)] == [
        "offload.pin_memory=true",
        "offload.pin_memory=false",
    ]


def test_a_folder_is_searched_for_plans_and_what_was_measured_counts_more(tmp_path):
    made_up.write(tmp_path / "0", record(), "plan.json")
    made_up.write(tmp_path / "1", record(), "plan.json")
    made_up.write(tmp_path / "1", made_up.record())

    assert [run.row["status"] for run in reading.read([tmp_path]).runs] == ["predicted", "ok"]


def test_plans_are_compared_as_runs_are_and_marked():
    compared = comparison.compare([plan()], [plan(batch_size=4)])
    console = Console(file=io.StringIO(), width=100)
    comparison_tables.show(compared, console)

    assert compared.pairs[0].decode.ratio == pytest.approx(2)
    assert "A is a plan: its figures are predicted" in console.file.getvalue()


def test_a_plan_is_no_failure(tmp_path):
    *_, markdown = tables.write([plan()], ["one"], tmp_path)

    assert "not ok" not in markdown.read_text()
    assert "predicted" in markdown.read_text()
