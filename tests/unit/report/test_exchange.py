"""What other tools read, by hand."""

import json
import statistics

import made_up
import numpy
import pytest

from zi_experiments.report import exchange, runs

STEP_S = [[0.1, 0.3], [0.2, 0.4]]  # of two passes; prefill takes twice the first


@pytest.fixture
def run():
    """Two sequences of 8 prompt tokens and 3 generated ones."""
    return made(step_s=STEP_S)


def made(step_s, **changes):
    record = made_up.record(batch_size=2, steps=2, **changes)
    made_up.measured(record, step_s)
    return runs.from_record(record, "x/result.json")


def test_a_run_is_a_prompt_and_what_follows_it(run):
    prompt, generated = exchange.llama_bench(run)

    assert [prompt[key] for key in ("n_prompt", "n_gen", "n_depth")] == [8, 0, 0]
    assert [generated[key] for key in ("n_prompt", "n_gen", "n_depth")] == [0, 2, 8]
    assert prompt["samples_ns"] == [200_000_000, 400_000_000]
    assert prompt["samples_ts"] == pytest.approx([2 * 8 / 0.2, 2 * 8 / 0.4])
    assert generated["samples_ts"] == pytest.approx([2 * 2 / 0.4, 2 * 2 / 0.6])
    for test in (prompt, generated):
        assert test["avg_ts"] == pytest.approx(statistics.mean(test["samples_ts"]))
        assert test["stddev_ts"] == pytest.approx(statistics.stdev(test["samples_ts"]))
        assert test["avg_ns"] == pytest.approx(statistics.mean(test["samples_ns"]))
        assert test["stddev_ns"] == pytest.approx(statistics.stdev(test["samples_ns"]), abs=1)


def test_one_pass_has_no_deviation():
    for test in exchange.llama_bench(made(step_s=STEP_S[:1])):
        assert test["stddev_ts"] is None
        assert test["stddev_ns"] is None


def test_statistics_are_those_of_numpy(run):
    report = exchange.optimum_benchmark(run)
    every = [0.1, 0.3, 0.2, 0.4]
    latency = report["per_token"]["latency"]

    assert latency["values"] == every
    for percent in (50, 90, 95, 99):
        assert latency[f"p{percent}"] == pytest.approx(numpy.percentile(every, percent))
    assert latency["stdev"] == pytest.approx(numpy.std(every))
    assert latency["stdev_"] == pytest.approx(100 * numpy.std(every) / numpy.mean(every))
    assert latency["total"] == pytest.approx(1.0)
    assert report["decode"]["throughput"] == {"unit": "tokens/s", "value": pytest.approx(2 * 2 / 0.5)}
    assert report["prefill"]["throughput"] == {"unit": "samples/s", "value": pytest.approx(2 / 0.3)}
    assert report["generate"]["latency"]["values"] == pytest.approx([0.6, 1.0])


def test_the_files_have_the_runs_with_times(run, tmp_path):
    failed = made_up.record(status="oom")
    table, tests, reports = exchange.write([runs.from_record(failed, "y"), run], ["failed", "fine"], tmp_path)

    lines = table.read_text().splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| opt-125m fp16 | ")
    assert lines[2].endswith(" | stream | cpu | fp16 | 2 | pp8 | 60.00 ± 28.28 |")
    assert lines[3].endswith(" | tg2 @ d8 | 8.33 ± 2.36 |")
    assert [json.loads(line)["n_gen"] for line in tests.read_text().splitlines()] == [0, 2]
    assert list(json.loads(reports.read_text())) == ["fine"]


def test_without_a_second_token_nothing_is_decoded():
    record = made_up.record(steps=1)
    record["config"]["workload"]["gen_len"], record["samples"]["step_s"] = 1, [[]]
    run = runs.from_record(record, "x")

    assert len(list(exchange.llama_bench(run))) == 1
    assert {"decode", "per_token"}.isdisjoint(exchange.optimum_benchmark(run))
