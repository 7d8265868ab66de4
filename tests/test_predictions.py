"""docs/predictions.md: what plans predict against what runs have measured."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import predictions
from predictions import Measured

COMMAND = "python -m zi_experiments engine=stream quant=fp16 hardware.host_memory_gib=64 hardware.ceilings.flops=1e12"
# a link so slow that a pass of engine=stream takes what it streams, and nothing besides
FILE = """# measured by python -m zi_experiments.hardware
name: made-up
device: cuda
gpu: Made Up
num_gpus: 1
memory_gib: 16.0
host_memory_gib: null
dtypes: [float16]
ceilings: {link_bytes_per_s: 1.0e+8, hbm_bytes_per_s: 1.0e+12, flops: 1.0e+14, disk_bytes_per_s: null, source: made up}
calibration:
  link_back_bytes_per_s: null
  link_both_bytes_per_s: null
  link_pageable_bytes_per_s: 1.0e+7
  pin_bytes_per_s: null
  host_bytes_per_s: 1.0e+10
  disk_write_bytes_per_s: null
  gemm_flops: {float16: {1: 1.0e+12, 4096: 1.0e+14}}
  expand_elements_per_s: null
  layer_s: 1.0e-05
  step_s: 1.0e-05
"""


@pytest.fixture
def hardware(tmp_path):
    path = tmp_path / "made-up.yaml"
    path.write_text(FILE)
    return predictions.load_hardware(path)


def measured(prefill_s=1.0, step_s=1.0, command=COMMAND, **ceilings):
    return Measured(command=command, ceilings=ceilings, prefill_s=prefill_s, step_s=step_s)


def test_errors_by_hand(hardware):
    """Predicted is what is streamed over the link: a quarter more than measured, then a fifth less."""
    streamed_s = predictions.compare(measured(), hardware).plan.streamed_bytes_per_pass / 1e8
    one = predictions.compare(measured(streamed_s / 1.25, streamed_s / 0.8), hardware)

    assert streamed_s > 1
    assert (one.prefill_error, one.step_error) == (pytest.approx(0.25), pytest.approx(-0.2))
    assert one.prediction.limited_by == "link"


def test_rates_of_the_job_lie_over_those_of_the_file(hardware):
    alone = predictions.compare(measured(), hardware)
    twice = predictions.compare(measured(link_bytes_per_s=2e8), hardware)

    assert twice.prediction.decode_step_s == pytest.approx(alone.prediction.decode_step_s / 2)
    assert twice.plan.machine.ceilings == replace(hardware.ceilings, link_bytes_per_s=2e8)
    assert twice.plan.machine.calibration == hardware.calibration


@pytest.mark.parametrize(("typed", "gib", "capped"), [("", 16, False), (" hardware.memory_gib=4", 4, True)])
def test_memory_of_the_command_and_of_the_file(hardware, typed, gib, capped):
    machine = predictions.compare(measured(command=COMMAND + typed), hardware).plan.machine

    assert machine.gpu_memory_bytes == gib << 30
    assert machine.gpu_memory_is_capped is capped
    assert machine.host_memory_bytes == 64 << 30


def test_runs_of_a_file():
    """Cases with the rates of their job, and records with those that were typed; what has no figures is left out."""
    metrics = {"ttft_s": 2.0, "tpot_p50_s": 0.5}
    typed = {"link_bytes_per_s": 5e10, "flops": None, "source": "typed"}
    found = {
        "cases": {
            "a/stream": {"command": "a", "ceilings": {"flops": 7e14}, "metrics": metrics},
            "a/fsdp": {"command": "b", "ceilings": {}, "metrics": None},
        },
        "runs": [{"run": {"command": "c"}, "config": {"hardware": {"ceilings": typed}}, "metrics": metrics}],
    }

    assert list(predictions.runs(found)) == [
        Measured(command="a", ceilings={"flops": 7e14}, prefill_s=2.0, step_s=0.5),
        Measured(command="c", ceilings={"link_bytes_per_s": 5e10}, prefill_s=2.0, step_s=0.5),
    ]


def test_the_page_by_hand(hardware):
    streamed_s = predictions.compare(measured(), hardware).plan.streamed_bytes_per_pass / 1e8
    cached = measured(streamed_s / 0.6, streamed_s / 0.7, COMMAND + " workload.micro_batches=2")
    runs = [measured(streamed_s / 1.05, streamed_s), measured(streamed_s / 0.8, streamed_s), cached]
    page = predictions.page(hardware, "made-up.yaml", runs)

    lines = [line for line in page.splitlines() if line.startswith("| opt-125m | stream | cpu fp16 |")]
    assert [line.split(" | ")[3] for line in lines] == ["", "", "2 micro-batches"]
    assert [line.split(" | ")[6] for line in lines] == ["+5.0 %", "-20.0 %", "-40.0 %"]
    assert [line.split(" | ")[10] for line in lines] == ["+0.0 %", "+0.0 %", "-30.0 %"]
    assert "prefill median 20.0 %, worst 40.0 %; decode median 0.0 %, worst 30.0 %." in page
    assert "Of 3 runs 1 have their prefill predicted within 10 %, and 2 their decode step." in page


def test_plans_are_those_that_were_measured(hardware):
    """A prediction for other bytes than a run has moved would compare nothing."""
    machine = replace(hardware, memory_gib=139.8, gpu="H200", dtypes=["float16", "bfloat16"])
    moved = []
    for path in predictions.RESULTS:
        found = json.loads(path.read_text())
        entries = [*found.get("cases", {}).values(), *found.get("runs", [])]
        moved += [entry["plan"]["streamed_bytes_per_pass"] for entry in entries if entry["metrics"]]
    plans = [predictions.compare(each, machine).plan for each in predictions.load()]

    assert [plan.streamed_bytes_per_pass for plan in plans] == moved
    assert len({plan.run.engine.name for plan in plans}) == 4
