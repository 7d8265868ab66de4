"""What is found in folders and files, and what becomes of files that are broken or of another kind."""

import json
from pathlib import Path

import made_up
import pytest
from places import DOCS

from zi_experiments.config.schema import ConfigError
from zi_experiments.report import reading, runs

RESULTS = DOCS / "results"
WITHOUT_RUNS = {
    *(
        "families-h200.json",
        "guesses.json",
        "host-experts-h100.json",
        "host-h100.json",
        "kernels-h200.json",
        "scaling-copies-h100.json",
        "timeline.json",
        "timeline-experts.json",
    ),
}


def names(found):
    return [run.row["name"] for run in found.runs]


def test_a_folder_is_searched_and_its_runs_are_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 1):
        record = made_up.record(status="oom")
        record["run"]["name"] = str(number)
        made_up.write(tmp_path / "deep" / f"{number}-run", record)
    made_up.write(tmp_path, {"what": "else"}, "ds_config.json")

    assert names(reading.read([tmp_path])) == ["1", "2", "10"]


def test_a_file_that_two_paths_have_counts_once(tmp_path):
    made_up.write(tmp_path, made_up.record())

    assert len(reading.read([tmp_path, tmp_path / "result.json"]).runs) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"schema_version": 1, "stat', "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\x00\xff", "not JSON"),
        ("[]", "no runs"),
        ('{"runs": [3]}', "no runs"),
        ('{"cases": {}}', "no runs"),
        ('{"schema_version": 2, "status": "ok"}', "its schema_version is 2, and this version reads 1"),
    ],
)
def test_what_cannot_be_read_is_skipped_with_one_line_that_names_it(tmp_path, text, said):
    broken = tmp_path / "a" / "result.json"
    made_up.write(broken.parent, {})
    broken.write_text(text)
    made_up.write(tmp_path / "b", made_up.record())

    found = reading.read([tmp_path])

    (line,) = found.skipped
    assert len(found.runs) == 1
    assert str(broken) in line
    assert said in line
    assert "\n" not in line


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere is not there: name a folder"):
        reading.read([tmp_path / "nowhere"])


def test_committed_results_are_read_whatever_their_shape():
    found = reading.read([RESULTS])

    assert {Path(line.split(":")[0]).name for line in found.skipped} == WITHOUT_RUNS
    assert {Path(run.source).name for run in found.runs} == {
        path.name for path in RESULTS.glob("*.json")
    } - WITHOUT_RUNS
    for run in found.runs:
        assert run.row["status"] == "ok"
        assert None not in [run.row[name] for name in ("model", "engine", "offload", "quant", "machine")], run.source
        assert run.row["decode_tok_per_s"] > 0


def test_a_case_of_a_committed_file_has_the_choices_of_its_command():
    run = reading.read([RESULTS / "bench-h200.json"]).runs[0]
    case = json.loads((RESULTS / "bench-h200.json").read_text())["cases"]["opt-13b-fp16/stream"]

    assert (run.row["model"], run.row["engine"], run.row["quant"]) == ("opt-13b", "stream", "fp16")
    assert run.row["gen_len"] == 16
    assert run.row["prompt_len"] is None  # workload=zero-inference has it, which the file does not say
    assert run.row["decode_tok_per_s"] == case["metrics"]["decode_tok_per_s"]
    assert run.passes.step_s == case["samples"]["step_s"]


def test_a_case_that_has_failed_keeps_its_reason(tmp_path):
    case = {
        "command": "python -m zi_experiments engine=stream",
        "status": "oom",
        "error": "OutOfMemory: no room",
        "metrics": None,
    }
    made_up.write(tmp_path, {"command": "make bench-gpu", "cases": {"one": case}}, "bench.json")

    (run,) = reading.read([tmp_path / "bench.json"]).runs

    assert (run.row["status"], run.row["error_type"], run.row["error"]) == ("oom", "OutOfMemory", "no room")


def test_values_of_a_record():
    run = runs.from_record(made_up.record(batch_size=8, step_s=0.5, passes=2, steps=4), "here")

    assert run.row["sequences"] == 8
    assert run.row["tok_per_s_per_user"] == pytest.approx(2)
    assert run.row["decode_tok_per_s"] == pytest.approx(16)
    assert run.row["passes"] == 2
    assert run.row["verified"] is True
    assert run.row["source"] == "here"
    assert run.settings["workload.batch_size"] == 8
    assert run.settings["engine"] == "stream"
    assert run.environment["packages.transformers"]
    assert run.row["planned_host_total_bytes"] == made_up.REAL["plan"]["memory"][0]["total"]
    assert run.row["planned_gpu_total_bytes"] is None


@pytest.mark.parametrize(
    ("chosen", "found", "shown"),
    [
        ("RTX A6000", None, "RTX A6000"),  # a plan made on a laptop
        ("RTX A6000", "NVIDIA L4", "RTX A6000"),
        ("RTX A6000", "NVIDIA RTX A6000", "NVIDIA RTX A6000"),
        (None, "NVIDIA L4", "NVIDIA L4"),
        (None, None, "a processor"),
    ],
)
def test_the_machine_is_the_one_that_was_planned_for(chosen, found, shown):
    made = made_up.record(environment={"gpu": found, "cpu": "a processor"})
    made["config"]["hardware"]["gpu"] = chosen

    assert runs.from_record(made, "here").row["machine"] == shown


def test_what_is_missing_or_of_another_type_is_absent():
    metrics = {"decode_tok_per_s": "fast", "ttft_s": float("nan"), "tpot_p50_s": 0, "load_s": True, "gpu_peak_bytes": 0}
    run = runs.from_record(
        made_up.record(metrics=metrics, plan=[], samples={"ttft_s": ["a"]}, environment=None), "here"
    )

    assert {run.row[name] for name in ("decode_tok_per_s", "ttft_s", "load_s", "weight_bytes", "machine")} == {None}
    assert run.row["tok_per_s_per_user"] is None
    assert run.row["gpu_peak_bytes"] == 0  # measured, and not absent
    assert run.passes.ttft_s == []


def test_half_of_a_surrogate_pair_can_be_written():
    record = made_up.record()
    record["run"]["name"] = "\ud800"

    assert runs.from_record(record, "here").row["name"] == "?"


def test_labels_have_what_tells_runs_apart_and_no_more():
    engines = [made_up.record(engine=engine, batch_size=size) for engine in ("stream", "fsdp") for size in (1, 2)]
    same = [made_up.record(model="opt-13b"), made_up.record(model="opt-13b")]
    made = [runs.from_record(record, "") for record in [*engines, *same, made_up.record(model="opt-30b")]]

    assert runs.labels(made) == [
        "opt-125m-cpu-fp16 stream sequences=1",
        "opt-125m-cpu-fp16 stream sequences=2",
        "opt-125m-cpu-fp16 fsdp sequences=1",
        "opt-125m-cpu-fp16 fsdp sequences=2",
        "opt-13b-cpu-fp16",
        "opt-13b-cpu-fp16 #2",
        "opt-30b-cpu-fp16",
    ]
