"""Which runs belong together, what differs, and what the command says and returns."""

from dataclasses import fields

import made_up
import pytest

from zi_experiments.config.schema import ConfigError
from zi_experiments.report import command, comparison, runs
from zi_experiments.report.columns import COLUMNS
from zi_experiments.results.metrics import Metrics


def run(**changes):
    return runs.from_record(made_up.record(**changes), "")


def sweep(folder, **changes):
    """A folder with the runs of two offload targets and two quantizations."""
    for offload in ("cpu", "nvme"):
        for quant in ("fp16", "int4"):
            made_up.write(folder / f"{offload}-{quant}", made_up.record(offload=offload, quant=quant, **changes))
    return folder


def compare(*arguments):
    return command.main(["compare", *map(str, arguments)])


@pytest.fixture
def console(capsys, monkeypatch):
    """`console()` → what was printed, on a console of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    return lambda: capsys.readouterr().out


def test_every_figure_of_the_metrics_is_compared():
    """Also one that nobody has named in a column."""
    names = {field.name for field in fields(Metrics)} - {"spread"}

    assert {figure.column.name for figure in comparison.compare([run()], [run()]).pairs[0].figures} == names
    units = {column.name: column.unit for column in COLUMNS}
    assert (units["load_s"], units["link_bytes_per_s"], units["decode_tok_per_s"]) == ("s", "B/s", "tok/s")


def test_two_runs_belong_together_whatever_they_are():
    (pair,) = comparison.compare([run()], [run(engine="fsdp", model="opt-30b", step_s=0.05, batch_size=4)]).pairs

    assert pair.decode.ratio == pytest.approx(4)
    # engine.name and model.name would say the same again
    assert pair.settings == {
        "engine": ("stream", "fsdp"),
        "model": ("opt-125m", "opt-30b"),
        "workload.batch_size": (2, 4),
    }
    assert pair.environment == {}


def test_runs_of_the_same_names_belong_together():
    before = [run(offload=offload) for offload in ("cpu", "nvme")]
    after = [run(offload=offload, engine="fsdp") for offload in ("nvme", "cpu", "none")]

    compared = comparison.compare(before, after)

    assert [(p.name, p.before.row["offload"], p.after.row["offload"]) for p in compared.pairs] == [
        ("opt-125m-cpu-fp16", "cpu", "cpu"),
        ("opt-125m-nvme-fp16", "nvme", "nvme"),
    ]
    assert [each.row["offload"] for each in compared.only_after] == ["none"]


def test_runs_of_one_name_belong_together_by_the_settings_that_vary():
    before = [run(batch_size=size, step_s=0.1) for size in (1, 2, 4)]
    after = [run(batch_size=size, engine="fsdp", step_s=0.2) for size in (4, 2)]
    for each in (*before, *after):
        each.row["command"] = "python -m zi_experiments -m workload.batch_size=1,2,4"

    compared = comparison.compare(before, after)

    assert [pair.name for pair in compared.pairs] == ["workload.batch_size=2", "workload.batch_size=4"]
    assert [pair.decode.ratio for pair in compared.pairs] == pytest.approx([0.5, 0.5])
    assert [each.row["batch_size"] for each in compared.only_before] == [1]


def test_settings_that_were_not_typed_decide_when_those_that_were_are_the_same():
    before, after = ([run(steps=steps, step_s=0.1 * steps) for steps in (2, 4)] for _ in range(2))

    assert [pair.decode.ratio for pair in comparison.compare(before, after).pairs] == pytest.approx([1, 1])


def test_runs_that_share_no_settings_are_refused():
    with pytest.raises(ConfigError, match="no run of A has the settings of a run of B"):
        comparison.compare([run(model="opt-13b"), run(model="opt-30b")], [run(model="opt-66b")])


def test_what_differs_everywhere_is_found():
    differences = [{"a": (1, 2), "b": (1, 3)}, {"a": (1, 2), "b": (1, 4)}, {"a": (1, 2)}]

    assert comparison.shared(differences) == {"a": (1, 2)}


def test_an_absent_figure_has_no_ratio():
    record = made_up.record()
    record["metrics"]["decode_tok_per_s"] = None
    (pair,) = comparison.compare([runs.from_record(record, "")], [run()]).pairs

    assert (pair.decode.before, pair.decode.ratio, pair.decode.interval) == (None, None, None)


def test_an_error_of_a_prediction_becomes_a_ratio_of_predicted_and_measured_times():
    records = [made_up.record(), made_up.record()]
    for record, error in zip(records, (-0.5, 0.5), strict=True):
        record["metrics"]["decode_prediction_error"] = error
    (pair,) = comparison.compare(*([runs.from_record(record, "")] for record in records)).pairs

    figure = next(each for each in pair.figures if each.column.name == "decode_prediction_error")
    assert (figure.before, figure.after, figure.ratio) == (0.5, 1.5, 3)


def test_the_table_of_a_pair(tmp_path, console):
    before = made_up.write(tmp_path / "a", made_up.record(passes=6, noise=0.01))
    after = made_up.write(tmp_path / "b", made_up.record(passes=6, noise=0.01, step_s=0.05, engine="fsdp"))

    code = compare(before, after)
    shown = console()

    assert code == 0
    assert f"B: opt-125m-cpu-fp16 ({after / 'result.json'})" in " ".join(shown.split())
    assert max(len(line) for line in shown.splitlines() if line[:2] not in ("A:", "B:")) == 80  # paths may be longer
    (decode,) = [line for line in shown.splitlines() if line.startswith("│ decode tok/s  ")]
    assert decode.split("│")[4].strip().startswith(("1.9", "2.0"))
    assert "better" in decode
    assert any(line.replace("│", "").split() == ["engine", "stream", "fsdp"] for line in shown.splitlines())
    assert "no environment that differs" in shown
    assert "no verdict" not in shown


def test_few_passes_have_no_verdict(tmp_path, console):
    before = made_up.write(tmp_path / "a", made_up.record(passes=3, noise=0.01))
    after = made_up.write(tmp_path / "b", made_up.record(passes=3, noise=0.01, step_s=0.05))

    compare(before, after)
    shown = console()

    assert "with fewer than 5 of them there is no verdict" in shown
    assert "better" not in shown


@pytest.mark.parametrize(("least", "code"), [("0.95", 1), ("0.85", 0)])
def test_fail_below_is_about_the_ratio_of_decode_throughput_of_any_pair(tmp_path, console, least, code):
    before, after = sweep(tmp_path / "a"), sweep(tmp_path / "b")
    made_up.write(after / "nvme-int4", made_up.record(offload="nvme", quant="int4", step_s=0.1 / 0.9))

    assert compare(before, after, "--fail-below", least) == code

    lines = [line for line in console().splitlines() if line.startswith("below")]
    assert lines == (["below 0.95: decode B / A is 0.900 for opt-125m-nvme-int4"] if code else [])


def test_fail_below_counts_a_run_that_has_failed_only_in_b(tmp_path, console):
    before, after = sweep(tmp_path / "a"), sweep(tmp_path / "b")
    made_up.write(after / "cpu-int4", made_up.record(quant="int4", status="oom"))
    made_up.write(before / "nvme-int4", made_up.record(offload="nvme", quant="int4", status="oom"))

    assert compare(before, after) == 0
    assert "B is oom: the GPU ran out of memory while loading" in console()
    assert compare(before, after, "--fail-below", "0.5") == 1
    assert "below 0.5: decode B / A is absent for opt-125m-cpu-int4" in console()
    assert compare(after, before, "--fail-below", "0.5") == 1


def test_fail_below_without_anything_to_hold_against_fails(tmp_path, capsys):
    failed = made_up.write(tmp_path / "a", made_up.record(status="oom"))

    assert compare(failed, made_up.write(tmp_path / "b", made_up.record()), "--fail-below", "0.95") == 1
    assert "--fail-below needs a run in A with decode_tok_per_s" in capsys.readouterr().err


def test_markup_in_names_is_text(tmp_path, console):
    before, after = sweep(tmp_path / "a"), sweep(tmp_path / "b")
    for folder in (before, after):
        record = made_up.record(offload="none")
        record["run"]["name"] = "[red]x[/red] [/nothing]"
        made_up.write(folder / "marked", record)

    assert compare(before, after) == 0
    assert "[red]x[/red] [/nothing]" in console()


def test_nothing_to_compare_is_one_line(tmp_path, capsys):
    assert compare(tmp_path, tmp_path) == 1
    assert (
        capsys.readouterr().err
        == f"refused: no runs in {tmp_path}: name a folder that has a result.json or a plan.json\n"
    )


@pytest.mark.parametrize("typed", ["nan", "0", "-1", "inf", "much"])
def test_a_gate_that_no_run_could_fail_is_refused(typed, capsys):
    with pytest.raises(SystemExit):
        command.main(["compare", "a", "b", f"--fail-below={typed}"])

    assert f"{typed} is not a ratio: pass a number above 0" in capsys.readouterr().err
