"""The sentence after a run: what a decode step had to do at least, and what it took."""

import re
from dataclasses import replace
from math import inf

import pytest

from zi_experiments.config.schema import Ceilings
from zi_experiments.cost_model.prediction import predict
from zi_experiments.measurement.timing import Pass, Samples
from zi_experiments.results import explanation, metrics

UNKNOWN = Ceilings(**dict.fromkeys(Ceilings.__dataclass_fields__))
ENDLESS = replace(UNKNOWN, link_bytes_per_s=inf, hbm_bytes_per_s=inf, flops=inf, disk_bytes_per_s=inf)


@pytest.fixture
def said(make_plan, machine):
    """`said(step_s, *overrides, calibration=…, **ceilings)` → the sentence of a run whose steps took so long.

    Rates that are not given do not limit it.
    """

    def said(step_s, *overrides, calibration=None, rates=ENDLESS, **ceilings):
        on = machine("h200", ceilings=replace(rates, **ceilings), calibration=calibration)
        work = ("model=opt-13b", "quant=fp16", "workload=zero-inference")
        plan = make_plan(*work, *overrides, on=on)
        steps = [step_s] * (plan.run.workload.gen_len - 1)
        one = Pass(ttft_s=1.0, total_s=1.0 + sum(steps), step_s=steps)
        samples = Samples(load_s=1.0, warmup=[], measured=[one])
        peaks = {"gpu_peak_bytes": 0, "host_peak_bytes": 0, "disk_peak_bytes": 0}
        return explanation.sentence(
            plan, predict(plan), metrics.derive(samples, plan, predict(plan), perplexity=None, **peaks)
        )

    return said


def test_the_sentence_of_the_largest_model(said):
    """OPT-175B in INT4: all but its vectors is streamed, 4.5 bits a weight."""
    asked = ("model=opt-175b", "quant=int4", "workload.batch_size=8")

    assert said(1.87, *asked, link_bytes_per_s=55.5e9) == (
        "decode streams 98.2 GB per step over a 55.5 GB/s link: at least 1.77 s; measured 1.87 s (95 %)"
    )


# OPT-13B: 25.7 GB are streamed; 25.2 GB of matrices and 3.4 GB of keys and values are read, and 8 · 25.2 GFLOP computed
@pytest.mark.parametrize(
    ("overrides", "ceilings", "expected"),
    [
        (
            ("offload=cpu",),
            {"link_bytes_per_s": 50e9},
            "decode streams 25.7 GB per step over a 50.0 GB/s link: at least 514.0 ms; measured 1.00 s (51 %)",
        ),
        (
            ("offload=nvme",),
            {"disk_bytes_per_s": 26e9},
            "decode reads 25.7 GB per step from a 26.0 GB/s disk: at least 988.5 ms; measured 1.00 s (99 %)",
        ),
        (
            ("offload=none",),
            {"hbm_bytes_per_s": 4e12},
            "decode reads 28.5 GB per step from 4.0 TB/s memory: at least 7.1 ms; measured 1.00 s (1 %)",
        ),
        (
            ("offload=none",),
            {"flops": 1e12},
            "decode computes 201.3 GFLOP per step at 1.0 TFLOP/s: at least 201.3 ms; measured 1.00 s (20 %)",
        ),
    ],
    ids=str,
)
def test_each_limit_has_its_words(said, overrides, ceilings, expected):
    assert said(1.0, *overrides, **ceilings).partition(". The prediction")[0] == expected


def test_ranks_have_a_link_each_and_share_the_disk(said):
    assert said(1.0, "offload=cpu", "hardware.num_gpus=2", link_bytes_per_s=50e9) == (
        "decode streams 25.7 GB per step over a 100.0 GB/s link: at least 257.0 ms; measured 1.00 s (26 %)"
    )
    assert "25.7 GB per step from a 26.0 GB/s disk" in said(
        1.0, "offload=nvme", "hardware.num_gpus=2", disk_bytes_per_s=26e9
    )


def test_keys_and_values_that_cross_are_streamed_too(said):
    """3.36 GB of them beside 25.7 GB of weights."""
    assert said(1.0, "offload=cpu", "kv_cache=cpu", link_bytes_per_s=50e9).startswith("decode streams 29.1 GB per step")


def test_what_takes_longest_by_plan_is_named_where_it_is_not_the_limit(said, machine):
    slow = replace(machine("measured").calibration, layer_s=0.05)
    told = said(9.0, "offload=cpu", calibration=slow, link_bytes_per_s=50e9)

    assert re.fullmatch(
        r"decode streams 25\.7 GB .* measured 9\.00 s \(6 %\)\. The prediction spends most of it on launching operations",
        told,
    )
    quick = replace(slow, layer_s=1e-6)
    assert said(9.0, "offload=cpu", calibration=quick, link_bytes_per_s=50e9).endswith("(6 %)")


def test_nothing_is_said_where_nothing_is_known(said):
    assert said(1.0, "offload=cpu", rates=UNKNOWN) is None


def test_a_bound_is_said_to_be_unknown_with_what_to_type(make_plan, machine):
    h200 = machine("h200")
    on = replace(h200, ceilings=replace(h200.ceilings, disk_bytes_per_s=None))

    assert explanation.unknown(make_plan("model=opt-13b", "offload=cpu", on=on)) is None
    assert explanation.unknown(make_plan("model=opt-13b", "offload=nvme", on=on)) == (
        "no estimate of time, since disk_bytes_per_s of this machine is not known: pass "
        "hardware.ceilings.disk_bytes_per_s=…, or measure it with python -m zi_experiments.hardware --path FOLDER"
    )
    nothing = explanation.unknown(make_plan("model=opt-13b", "offload=none", on=machine("h200", ceilings=UNKNOWN)))
    assert "hardware.ceilings.hbm_bytes_per_s=… hardware.ceilings.flops=…, or measure it" in nothing
    assert "link" not in nothing
    assert "--path" not in nothing


def test_nothing_is_said_of_a_run_without_decode(said):
    assert said(1.0, "offload=cpu", "workload.gen_len=1", link_bytes_per_s=50e9) is None


@pytest.mark.parametrize(
    ("measured_s", "text"),
    [
        (0.150, "93.0 ms (38 % too low)"),
        (0.080, "93.0 ms (16 % too high)"),
        (0.031, "93.0 ms (3.0 × too high)"),
        (0.093, "93.0 ms"),
    ],
)
def test_a_predicted_time_has_its_error(measured_s, text):
    assert explanation.predicted(0.093, 0.093 / measured_s - 1) == text
