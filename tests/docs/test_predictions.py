"""docs/predictions.md: what plans predict against what runs have measured."""

import json
from dataclasses import asdict, replace

import predictions
import pytest

from zi_experiments.config.schema import Calibration, Ceilings

COMMAND = "python -m zi_experiments engine=stream quant=fp16 hardware.host_memory_gib=64 hardware.ceilings.flops=1e12"
# a link so slow that a pass of engine=stream takes what it streams, and nothing besides
LINK = 1e8
CEILINGS = Ceilings(
    link_bytes_per_s=LINK,
    hbm_bytes_per_s=1e12,
    flops=1e14,
    disk_bytes_per_s=None,
    host_memory_bytes_per_s=None,
    source="made up",
)
CALIBRATION = Calibration(
    link_back_bytes_per_s=None,
    link_both_bytes_per_s=None,
    link_pageable_bytes_per_s=1e7,
    pin_bytes_per_s=1e10,
    host_bytes_per_s=1e10,
    disk_write_bytes_per_s=None,
    gemm_flops={"float16": {1: 1e12, 4096: 1e14}},
    attention_flops=None,
    cache_bytes_per_s=None,
    expand_elements_per_s=None,
    layer_s=1e-5,
    step_s=1e-5,
    host_read_bytes_per_s=None,
    host_layer_s=None,
    host_layer_busy_s=None,
    link_busy_bytes_per_s=None,
    host_experts_bytes_per_s=None,
    moments=None,
)


def case(prefill_s=1.0, step_s=1.0, command=COMMAND, gpu="Made Up"):
    """A case as a benchmark's file has it, which is JSON."""
    made = {
        "command": command,
        "metrics": {"ttft_s": prefill_s, "tpot_p50_s": step_s, "load_s": 12.34},
        "samples": {"step_s": [[step_s] * 3] * 2},
        "environment": {"gpu": gpu, "cpu": "A Processor", "cpu_cores": 2, "driver": None},
        "plan": {
            "device": "cuda",
            "dtype": "float16",
            "memory": [{"where": "GPU", "available": 16 << 30}, {"where": "host", "available": 64 << 30}],
            "rates": asdict(CEILINGS) | {"calibration": asdict(CALIBRATION)},
        },
    }
    return json.loads(json.dumps(made))


def measured(*args, **kwargs):
    (found,) = predictions.runs({"cases": {"one": case(*args, **kwargs)}})
    return found


@pytest.fixture(scope="module")
def streamed_s():
    """What a pass streams, over the link."""
    return predictions.compare(measured()).plan.streamed_bytes_per_pass / LINK


def test_errors_by_hand(streamed_s):
    """Predicted is what is streamed over the link: a quarter more than measured, then a fifth less."""
    one = predictions.compare(measured(streamed_s / 1.25, streamed_s / 0.8))

    assert streamed_s > 1
    assert (one.prefill_error, one.step_error) == (pytest.approx(0.25), pytest.approx(-0.2))
    assert one.prediction.limited_by == "link"


@pytest.mark.parametrize(("typed", "capped"), [("", False), (" hardware.memory_gib=16", True)])
def test_the_machine_is_the_one_that_was_planned_for(typed, capped):
    machine = predictions.compare(measured(command=COMMAND + typed)).plan.machine

    assert (machine.ceilings, machine.calibration) == (CEILINGS, CALIBRATION)
    assert (machine.gpu_memory_bytes, machine.host_memory_bytes) == (16 << 30, 64 << 30)
    assert machine.gpu_memory_is_capped is capped
    assert (machine.gpu_name, machine.device, machine.dtypes) == ("Made Up", "cuda", ("float16",))


def test_what_was_copied_is_given():
    """Two passes of three steps copied so many bytes, over a link that takes everything else with it."""
    made = case(command=f"{COMMAND} model=mixtral-8x7b quant=int4 workload.batch_size=1", step_s=2.0)
    made["plan"]["memory"][0]["available"] = 24 << 30
    counts = {"layers": 96, "experts": 192, "copied": 6, "copied_bytes": 6e8, "read": 0, "read_bytes": 0}
    made["samples"]["routed"] = [counts, counts | {"copied_bytes": 12e8}]
    (run,) = predictions.runs({"cases": {"one": made}})

    drawn, given = predictions.compare(replace(run, routed=None)), predictions.compare(run)

    assert drawn.prediction.decode_step_s - given.prediction.decode_step_s == pytest.approx(
        (drawn.plan.streamed_bytes_per_step - 18e8 / 6) / LINK, rel=0.01
    )


def test_what_has_no_figures_or_no_measured_machine_is_left_out():
    failed, published = case(), case()
    failed["metrics"] = None
    published["plan"]["rates"]["calibration"] = None

    assert list(predictions.runs({"cases": {"failed": failed, "published": published}})) == []


def test_the_page_by_hand(streamed_s):
    cached = measured(streamed_s / 0.6, streamed_s / 0.7, COMMAND + " workload.micro_batches=2")
    runs = [measured(streamed_s / 1.05, streamed_s), measured(streamed_s / 0.8, streamed_s), cached]
    page = predictions.page([*runs, measured(streamed_s, streamed_s / 1.01, gpu=None)])

    before, _, after = page.partition("## A Processor, 2 cores\n")
    assert "## Made Up" in before
    lines = [line for line in before.splitlines() if line.startswith("| opt-125m | stream | cpu fp16 |")]
    assert [line.split(" | ")[4] for line in lines] == ["", "", "2 micro-batches"]
    assert [line.split(" | ")[7] for line in lines] == ["+5.0 %", "-20.0 %", "-40.0 %"]
    assert [line.split(" | ")[11] for line in lines] == ["+0.0 %", "+0.0 %", "-30.0 %"]
    loaded = predictions.compare(cached).prediction.load_s
    assert {tuple(line.rstrip(" |").split(" | ")[-2:]) for line in lines} == {("12.3", f"{loaded:.1f}")}
    assert "prefill median 20.0 %, worst 40.0 %; decode median 0.0 %, worst 30.0 %." in before
    assert "Of 3 runs 1 have their prefill predicted within 10 %, and 2 their decode step." in before
    assert "decode median 1.0 %, worst 1.0 %. Of 1 runs 1 have" in after


def test_a_processor_is_allowed_more():
    one = measured(gpu=None)
    one = replace(one, machine=replace(one.machine, device="cpu", gpu_memory_bytes=None))
    found = predictions.compare(one).prediction
    runs = [replace(one, prefill_s=found.prefill_s / over, step_s=found.decode_step_s / over) for over in (1.2, 0.7)]

    assert "Of 2 runs 1 have their prefill predicted within 25 %, and 1 their decode step." in predictions.page(runs)


def test_plans_are_those_that_were_measured():
    """A prediction for other bytes than a run has moved would compare nothing."""
    found = [json.loads(path.read_text()) for path in predictions.RESULTS]
    moved = [case["plan"]["streamed_bytes_per_pass"] for file in found for case in file["cases"].values()]
    plans = [predictions.compare(each).plan for each in predictions.load()]

    assert [plan.streamed_bytes_per_pass for plan in plans] == moved
    assert len({plan.run.engine.name for plan in plans}) == 4


def test_the_page_is_what_is_generated(pytestconfig):
    page = predictions.page(predictions.load())
    if pytestconfig.getoption("update_golden"):
        predictions.PAGE.write_text(page)
    assert predictions.PAGE.read_text() == page
