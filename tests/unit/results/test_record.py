import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from zi_experiments.cost_model.prediction import predict
from zi_experiments.engines.deepspeed import ds_config
from zi_experiments.measurement.timing import Pass, Samples
from zi_experiments.results import metrics
from zi_experiments.results.record import Failure, Record, RunInfo
from zi_experiments.results.sinks.base import Guarded
from zi_experiments.results.sinks.result_file import ResultFile

OVERRIDES = ["model=opt-13b", "offload=cpu", "quant=int4", "workload.gen_len=3"]

# The keys that other programs may rely on: fields may be added, and none may go without a new schema version.
TOP = {
    "schema_version",
    "status",
    "error",
    "run",
    "choices",
    "config",
    "ds_config",
    "plan",
    "environment",
    "samples",
    "metrics",
    "verification",
}
KEYS = {
    "run": {"id", "name", "group", "started_at", "finished_at", "command", "git_revision"},
    "plan": {
        "batch_size",
        "sequences",
        "dtype",
        "weight_bytes",
        "kv_cache_bytes",
        "placement",
        "streamed_bytes_per_pass",
        "memory",
        "bound",
        "prediction",
    },
    "samples": {"load_s", "ttft_s", "total_s", "step_s", "warmup"},
    "metrics": {
        "prefill_tok_per_s",
        "decode_tok_per_s",
        "total_tok_per_s",
        "ttft_s",
        "tpot_p50_s",
        "tpot_p90_s",
        "tpot_p99_s",
        "load_s",
        "gpu_peak_bytes",
        "host_peak_bytes",
        "disk_peak_bytes",
        "link_bytes_per_s",
        "fraction_of_bound",
        "prefill_fraction_of_bound",
        "prefill_prediction_error",
        "decode_prediction_error",
    },
}


@pytest.fixture
def begun(compose, tmp_path):
    """The record of a run of which nothing is known yet but what was asked."""
    return Record(
        run=RunInfo(
            id="0123456789ab",
            name="opt-13b-cpu-int4",
            group=None,
            started_at="2030-01-01T00:00:00.000+00:00",
            finished_at=None,
            command="python -m zi_experiments model=opt-13b",
            git_revision=None,
        ),
        folder=str(tmp_path / "run"),
        choices={"model": "opt-13b", "experiment": None},
        config=OmegaConf.to_container(compose(*OVERRIDES), resolve=True, enum_to_str=True),
    )


@pytest.fixture
def done(begun, make_plan):
    plan = make_plan(*OVERRIDES)
    one = Pass(ttft_s=2.0, total_s=3.0, step_s=[0.4, 0.6], joules={"gpu:a": (1.0, 2.5)})
    samples = Samples(load_s=30.0, warmup=[one], measured=[one, one])
    return replace(
        begun,
        status="ok",
        plan=plan,
        prediction=predict(plan),
        ds_config=ds_config.build(plan),
        environment={"python": "3.11"},
        samples=samples,
        metrics=metrics.derive(
            samples, plan, predict(plan), perplexity=None, gpu_peak_bytes=1, host_peak_bytes=2, disk_peak_bytes=0
        ),
    )


def result(record):
    ResultFile().write(record)
    with open(f"{record.folder}/result.json") as file:
        return json.load(file)


def test_every_promised_key_is_there(done):
    written = result(done)

    assert set(written) >= TOP
    for key, names in KEYS.items():
        assert set(written[key]) >= names, key
    assert set(written["plan"]["placement"]) == {"gpu_bytes", "cpu_bytes", "nvme_bytes"}
    limits = {"prefill_s", "decode_step_s", "prefill_limited_by", "limited_by"}
    assert set(written["plan"]["bound"]) >= limits
    assert set(written["plan"]["prediction"]) >= limits | {"load_s", "total_tok_per_s"}
    parts = {"weights", "buffers", "kv_cache", "workspace", "processes", "total", "available"}
    assert [set(use) >= parts | {"where"} for use in written["plan"]["memory"]] == [True, True]
    assert written["schema_version"] == 1


def test_json_keeps_everything(done):
    written = result(done)

    assert written == json.loads(json.dumps(done.to_dict()))
    assert written["ds_config"] == done.ds_config
    assert written["config"]["workload"]["gen_len"] == 3
    assert written["config"]["offload"]["device"] == "cpu"
    assert written["plan"]["weight_bytes"] == done.plan.weight_bytes
    assert written["metrics"]["decode_tok_per_s"] == done.metrics.decode_tok_per_s
    assert written["metrics"]["spread"]["decode_tok_per_s"] == [8.0, 8.0]


def test_a_plan_of_a_batch_left_open_says_which_it_is(done, make_plan, machine):
    overrides = ("model=opt-13b", "workload.batch_size=auto", "engine=stream", "workload.micro_batches=2")
    plan = make_plan(*overrides, on=machine(gpu_memory_bytes=30 * 10**9))
    written = result(replace(done, plan=plan, prediction=predict(plan)))["plan"]

    assert written["batch_size"] == plan.run.workload.batch_size > 4
    assert written["sequences"] == 2 * written["batch_size"]


def test_the_record_of_a_run_that_was_not_to_be_is_withdrawn(begun, tmp_path):
    """And one that an earlier run has left there stays."""
    file = ResultFile()
    file.write(replace(begun, run=replace(begun.run, id="another")))
    file.write(begun)
    file.withdraw(begun)
    file.withdraw(begun)

    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result-another.json"]


def test_samples_are_those_of_the_measured_passes_with_warm_up_apart(done):
    assert result(done)["samples"] == {
        "load_s": 30.0,
        "ttft_s": [2.0, 2.0],
        "total_s": [3.0, 3.0],
        "step_s": [[0.4, 0.6], [0.4, 0.6]],
        "routed": [None, None],
        "joules": [{"gpu:a": [1.0, 2.5]}, {"gpu:a": [1.0, 2.5]}],
        "warmup": [
            {"ttft_s": 2.0, "total_s": 3.0, "step_s": [0.4, 0.6], "routed": None, "joules": {"gpu:a": [1.0, 2.5]}}
        ],
        "ranks": [],
    }


@pytest.mark.parametrize("status", ["refused", "oom", "killed", "error"])
def test_metrics_are_null_unless_the_run_is_ok(done, status):
    failed = replace(done, status=status, error=Failure(type="Boom", message="it broke", hint="mend it"))
    written = result(failed)

    assert written["metrics"] is None
    assert written["error"] == {"type": "Boom", "message": "it broke", "hint": "mend it", "traceback": None}


def test_a_run_that_has_only_begun_has_every_key_too(begun):
    written = result(begun)

    assert set(written) >= TOP
    assert written["status"] == "error"  # until something better is known
    assert [written[key] for key in ("error", "ds_config", "plan", "samples", "metrics", "verification")] == [None] * 6


def test_a_later_stage_leaves_the_earlier_record_alone(begun):
    later = replace(begun, status="ok")

    assert (begun.status, later.status) == ("error", "ok")
    with pytest.raises(AttributeError):
        begun.status = "ok"


@pytest.mark.parametrize("value", [nan, inf])
def test_a_figure_that_json_does_not_know_is_refused(done, tmp_path, value):
    broken = replace(done, metrics=replace(done.metrics, ttft_s=value))

    with pytest.raises(ValueError, match="JSON"):
        ResultFile().write(broken)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_refused_write_leaves_the_existing_result_alone(done, tmp_path):
    before = result(done)

    with pytest.raises(ValueError, match="JSON"):
        ResultFile().write(replace(done, metrics=replace(done.metrics, ttft_s=nan)))
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == before


def test_writing_leaves_one_file_and_no_temporary_one(done, tmp_path):
    ResultFile().write(done)

    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result.json"]


def test_two_that_write_at_the_same_time_leave_one_file(done, tmp_path):
    """Launchers that have lost each other do. Each write is synchronized with the disk, during which others write."""
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(ResultFile().write, [done] * 40))  # an error is raised here

    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result.json"]


def test_a_last_resort_keeps_a_finished_record_of_the_run(begun, done):
    """Another launcher writes it when the first is lost, which may have written by then."""
    run = replace(begun.run, finished_at="2026-11-01T12:00:00.000+00:00")
    lost = replace(begun, run=run, status="killed")
    path = Path(begun.folder) / "result.json"
    ResultFile().write(begun)

    assert ResultFile().write_unless_finished(lost)
    assert json.loads(path.read_text())["status"] == "killed"
    ResultFile().write(replace(done, run=run))
    assert not ResultFile().write_unless_finished(lost)
    assert json.loads(path.read_text())["status"] == "ok"
    assert list(path.parent.iterdir()) == [path]


def test_an_existing_result_is_replaced(begun, done, tmp_path):
    assert result(begun)["status"] == "error"
    assert result(done)["status"] == "ok"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result.json"]


class Sink:
    """A sink that notes what is asked of it and fails at one step."""

    def __init__(self, fails_at=None):
        self.fails_at = fails_at
        self.calls = []

    def __getattr__(self, step):
        def act(*arguments):
            self.calls.append(step)
            if step == self.fails_at:
                raise RuntimeError("no network")

        return act


def test_a_failing_sink_costs_one_warning_and_is_left_alone(begun, caplog):
    sink = Sink(fails_at="open")
    guarded = Guarded(sink)
    guarded.open(begun)
    guarded.write(begun)
    guarded.close()

    assert sink.calls == ["open"]
    assert [record.message for record in caplog.records] == ["Sink failed and is skipped: RuntimeError: no network"]


def test_a_guarded_sink_that_works_gets_everything(begun, caplog):
    sink = Sink()
    guarded = Guarded(sink)
    guarded.open(begun)
    guarded.write(begun)
    guarded.close()

    assert sink.calls == ["open", "write", "close"]
    assert caplog.records == []
