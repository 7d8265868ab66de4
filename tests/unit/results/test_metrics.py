from dataclasses import fields, replace

import pytest

from zi_experiments.cost_model.prediction import predict
from zi_experiments.engines.base import Routed
from zi_experiments.measurement.timing import Pass, Samples
from zi_experiments.results import metrics
from zi_experiments.results.metrics import derive


@pytest.fixture
def plan(make_plan):
    """Eight sequences of 16 prompt tokens, 3 generated, OPT-13B in host memory: the link bounds a step."""
    work = ["workload.batch_size=8", "workload.prompt_len=16", "workload.gen_len=3"]
    return make_plan("model=opt-13b", "quant=fp16", "offload=cpu", *work)


def measured(*passes, warmup=()):
    def one(ttft_s, *step_s):
        return Pass(ttft_s=ttft_s, total_s=ttft_s + sum(step_s), step_s=list(step_s))

    return Samples(load_s=12.5, warmup=[one(*times) for times in warmup], measured=[one(*times) for times in passes])


def figures(samples, plan, **peaks):
    given = {"perplexity": 4.0, "kl_divergence": 0.1, "gpu_peak_bytes": 1, "host_peak_bytes": 2, "disk_peak_bytes": 3}
    return derive(samples, plan, predict(plan), **(given | peaks))


def test_one_pass_by_hand(plan):
    got = figures(measured((2.0, 0.5, 1.5)), plan)

    assert got.ttft_s == 2.0
    assert got.prefill_tok_per_s == 8 * 16 / 2.0
    assert got.decode_tok_per_s == 8 * 2 / 2.0
    assert got.total_tok_per_s == 8 * 3 / 4.0
    assert got.tpot_p50_s == 1.0
    assert got.tok_per_s_per_user == 1.0
    assert got.load_s == 12.5


def with_energy(*joules):
    """Samples of passes with these readings."""
    made = measured(*[(1.0, 0.5, 0.5)] * len(joules))
    return replace(made, measured=[replace(one, joules=each) for one, each in zip(made.measured, joules, strict=True)])


def test_energy_is_that_of_all_passes_and_all_counters_of_a_kind(plan):
    """24 tokens a pass: two GPUs take 48 J in the first pass and 96 J in the second, the processor 12 J in both."""
    got = figures(
        with_energy(
            {"gpu:a": (0.0, 24.0), "gpu:b": (100.0, 124.0), "cpu:package-0": (1.0, 6.0)},
            {"gpu:a": (30.0, 78.0), "gpu:b": (130.0, 178.0), "cpu:package-0": (6.0, 13.0)},
        ),
        plan,
    )

    assert got.gpu_joules_per_token == (48 + 96) / (2 * 24)
    assert got.cpu_joules_per_token == 12 / (2 * 24)
    assert got.dram_joules_per_token is None


@pytest.mark.parametrize("joules", [{"gpu:a": (0.0, 24.0), "gpu:b": None}, {"gpu:a": (5.0, 5.0)}, {}])
def test_energy_that_was_not_counted_is_unknown_and_not_zero(plan, joules):
    assert figures(with_energy(joules), plan).gpu_joules_per_token is None


def test_cost_is_that_of_the_time_for_a_million_tokens(make_plan):
    """24 tokens in 2 s are a million in 83333 s, or 23.1 hours."""
    plan = make_plan("workload.batch_size=8", "workload.gen_len=3", "hardware.price_per_hour=3.6")
    got = figures(measured((1.0, 0.5, 0.5)), plan)

    assert got.cost_per_million_tokens == pytest.approx(1e6 / 12 / 3600 * 3.6)


def test_without_a_price_there_is_no_cost(plan):
    assert figures(measured((1.0, 0.5, 0.5)), plan).cost_per_million_tokens is None


def test_figures_are_medians_over_passes(plan):
    got = figures(measured((1.0, 0.5, 0.5), (2.0, 1.0, 1.0), (10.0, 5.0, 5.0)), plan)

    assert got.ttft_s == 2.0
    assert got.prefill_tok_per_s == 8 * 16 / 2.0
    assert got.decode_tok_per_s == 8 * 2 / 2.0
    assert got.total_tok_per_s == 8 * 3 / 4.0


def test_a_timeline_is_the_median_of_each_step_over_the_passes():
    samples = measured((1.0, 0.5, 4.0), (2.0, 1.0, 1.0), (10.0, 5.0, 2.0), warmup=[(1.0, 100.0, 100.0)])

    assert metrics.timeline(samples) == [1.0, 2.0]
    assert metrics.timeline(measured((1.0,), (2.0,))) == []


def test_each_rate_is_the_median_of_its_own_passes(plan):
    """The pass with the median prefill need not be the one with the median decode."""
    got = figures(measured((1.0, 4.0, 4.0), (2.0, 1.0, 1.0), (4.0, 2.0, 2.0)), plan)

    assert got.prefill_tok_per_s == 64.0
    assert got.decode_tok_per_s == 4.0


def test_warm_up_does_not_count(plan):
    cold = measured((2.0, 1.0, 1.0), warmup=[(500.0, 100.0, 100.0)])

    assert figures(cold, plan) == figures(measured((2.0, 1.0, 1.0)), plan)


def test_spread_is_the_smallest_and_largest_pass(plan):
    got = figures(measured((1.0, 0.5, 0.5), (2.0, 1.0, 1.0), (4.0, 2.0, 2.0)), plan)

    assert got.spread == {
        "prefill_tok_per_s": (32.0, 128.0),
        "decode_tok_per_s": (4.0, 16.0),
        "total_tok_per_s": (8 * 3 / 8.0, 8 * 3 / 2.0),
    }


def test_percentiles_are_over_the_steps_of_all_passes(plan):
    """101 steps of 0, 1, …, 100 ms: the n-th percentile is n ms."""
    steps = [step / 1000 for step in range(101)]
    got = figures(measured((1.0, *steps[50:]), (1.0, *steps[:50])), plan)

    assert got.tpot_p50_s == pytest.approx(0.050)
    assert got.tpot_p90_s == pytest.approx(0.090)
    assert got.tpot_p99_s == pytest.approx(0.099)


def test_percentiles_of_a_single_step_are_that_step(make_plan):
    plan = make_plan("workload.gen_len=2")
    got = figures(measured((1.0, 0.25)), plan)

    assert (got.tpot_p50_s, got.tpot_p90_s, got.tpot_p99_s) == (0.25, 0.25, 0.25)


def test_one_token_has_no_decode(make_plan):
    plan = make_plan("model=opt-13b", "workload.gen_len=1", "workload.batch_size=4", "workload.prompt_len=32")
    got = figures(measured((2.0,), (2.0,)), plan)

    assert got.decode_tok_per_s is None
    assert (got.tpot_p50_s, got.tpot_p90_s, got.tpot_p99_s) == (None, None, None)
    assert (got.link_bytes_per_s, got.fraction_of_bound) == (None, None)
    assert got.prefill_tok_per_s == 64.0
    assert got.prefill_fraction_of_bound is not None
    assert set(got.spread) == {"prefill_tok_per_s", "total_tok_per_s"}


def test_link_rate_is_streamed_bytes_over_the_median_step(plan):
    got = figures(measured((2.0, 0.5, 0.5)), plan)

    assert got.link_bytes_per_s == plan.streamed_bytes_per_pass / 0.5
    assert got.link_bytes_per_s == pytest.approx(51.4e9, rel=1e-3)


def test_fractions_are_the_bound_over_the_measured_time(plan):
    """The bound of a pass is 25.7 GB / 63 GB/s = 0.408 s, of prefill too."""
    got = figures(measured((0.816, 0.5, 0.5)), plan)

    assert got.fraction_of_bound == pytest.approx(0.816, rel=1e-3)
    assert got.prefill_fraction_of_bound == pytest.approx(0.5, rel=1e-3)


def test_the_error_of_a_prediction_is_what_it_has_too_much(make_plan, machine):
    """Predicted 1.25 times what was measured is +25 %, and half of it is −50 %."""
    plan = make_plan("model=opt-13b", "workload.gen_len=3", on=machine("measured"))
    predicted = predict(plan)
    got = figures(measured((predicted.prefill_s / 1.25, *[2 * predicted.decode_step_s] * 2)), plan)

    assert got.prefill_prediction_error == pytest.approx(0.25)
    assert got.decode_prediction_error == pytest.approx(-0.5)


def test_without_rates_or_a_step_there_is_no_error(make_plan, machine):
    unknown = figures(measured((1.0, 0.5)), make_plan("workload.gen_len=2", on=machine("cpu")))
    one_token = figures(measured((1.0,)), make_plan("workload.gen_len=1", on=machine("measured")))

    assert (unknown.prefill_prediction_error, unknown.decode_prediction_error) == (None, None)
    assert one_token.prefill_prediction_error is not None
    assert one_token.decode_prediction_error is None


def test_without_a_bound_there_is_no_fraction(make_plan, machine):
    got = figures(measured((1.0, 0.5)), make_plan("workload.gen_len=2", on=machine("cpu")))

    assert (got.fraction_of_bound, got.prefill_fraction_of_bound) == (None, None)


@pytest.mark.parametrize(
    ("times", "beyond"),
    [
        ((0.816, 0.5, 0.5), None),
        ((0.400, 0.5, 0.5), None),  # by 2 %, which is noise
        ((0.204, 0.5, 0.5), {"prefill"}),
        ((0.816, 0.3, 0.3), {"decode"}),
        ((0.204, 0.3, 0.3), {"prefill", "decode"}),
    ],
)
def test_a_bound_that_is_passed_is_none(plan, times, beyond):
    """The bound of a pass is 0.408 s."""
    got = figures(measured(times), plan)
    without = metrics.without_passed(got)
    found = metrics.passed(got)

    assert (set(found) if found else None) == beyond
    assert (without.fraction_of_bound is None) == ("decode" in (beyond or ()))
    assert (without.prefill_fraction_of_bound is None) == ("prefill" in (beyond or ()))
    assert metrics.passed(without) is None
    assert without.decode_tok_per_s == got.decode_tok_per_s


def test_nothing_crosses_the_link_without_offload(make_plan):
    assert not figures(measured((1.0, 0.5)), make_plan("offload=none", "workload.gen_len=2")).link_bytes_per_s


def test_peaks_pass_through(plan):
    got = figures(measured((1.0, 0.5, 0.5)), plan, gpu_peak_bytes=11, host_peak_bytes=22, disk_peak_bytes=0)

    assert (got.gpu_peak_bytes, got.host_peak_bytes, got.disk_peak_bytes) == (11, 22, 0)


def test_rates_are_over_all_ranks(make_plan):
    one, two = (
        make_plan("workload.batch_size=8", "workload.gen_len=3", f"hardware.num_gpus={ranks}") for ranks in (1, 2)
    )
    samples = measured((1.0, 0.5, 0.5))

    assert figures(samples, one).decode_tok_per_s == figures(samples, two).decode_tok_per_s == 16.0


def test_every_figure_is_set(make_plan, machine):
    plan = make_plan("model=opt-13b", "workload.gen_len=3", "hardware.price_per_hour=2", on=machine("measured"))
    counted = dict.fromkeys(("gpu:a", "cpu:package-0", "dram:package-0"), (1.0, 2.0))
    got = figures(with_energy(counted), plan)

    unset = [field.name for field in fields(got) if getattr(got, field.name) is None]
    routed = ["experts_per_layer", "experts_per_layer_on_host", "expert_hit_rate", "expert_host_hit_rate"]
    assert unset == routed, "which no experts are routed for"


def test_routed_experts_are_counted_and_their_bytes_are_those_of_the_bound(make_plan, machine):
    work = ["workload.batch_size=1", "workload.gen_len=3"]
    plan = make_plan("model=mixtral-8x7b", "engine=stream", "quant=int4", "offload=cpu", *work, on=machine("measured"))
    spread = figures(measured((2.0, 0.5, 0.5)), plan)
    one, two = (
        Pass(ttft_s=2.0, total_s=3.0, step_s=[0.5, 0.5], routed=Routed(64, 100, copied, copied * 10**8, 0, 0))
        for copied in (20, 60)
    )
    got = figures(Samples(load_s=1.0, warmup=[], measured=[one, two]), plan)

    assert plan.storage.routes
    assert (got.experts_per_layer, got.expert_hit_rate) == (100 / 64, 1 - 80 / 200)
    assert got.link_bytes_per_s == pytest.approx(80 * 10**8 / 4 / 0.5)
    ratio = 80 * 10**8 / 4 / plan.streamed_bytes_per_step
    assert got.fraction_of_bound == pytest.approx(ratio * spread.fraction_of_bound)
    assert got.decode_prediction_error < spread.decode_prediction_error, "it is given fewer bytes"
    assert (got.expert_host_hit_rate, got.disk_bytes_per_s) == (None, 0), "nothing is on disk"


def test_experts_on_the_host_are_counted_and_their_bytes_are_those_of_the_bound(make_plan, machine):
    known = machine("measured")
    rates = {"host_experts_bytes_per_s": 40e9, "link_busy_bytes_per_s": 40e9, "host_read_bytes_per_s": 50e9}
    on = replace(known, calibration=replace(known.calibration, **rates))
    work = ["workload.batch_size=1", "workload.gen_len=3", "offload.compute=0.5"]
    plan = make_plan("model=mixtral-8x7b", "engine=stream", "quant=int4", "offload=cpu", *work, on=on)
    routed = Routed(64, 100, 20, 20 * 10**8, 0, 0, on_host=60, on_host_bytes=60 * 10**8)
    one = Pass(ttft_s=2.0, total_s=3.0, step_s=[0.5, 0.5], routed=routed)
    got = figures(Samples(load_s=1.0, warmup=[], measured=[one, one]), plan)

    assert (got.experts_per_layer, got.experts_per_layer_on_host) == (100 / 64, 60 / 64)
    assert got.expert_hit_rate == pytest.approx(20 / 100)
    assert got.link_bytes_per_s == pytest.approx(20 * 10**8 / 2 / 0.5)
    assert got.fraction_of_bound == pytest.approx(60 * 10**8 / 2 / 50e9 / 0.5), "the host reads more than crosses"


@pytest.mark.parametrize(("device", "wanted"), [("cuda", 80), ("cpu", 200)])
def test_what_was_read_is_that_of_the_bound(make_plan, machine, device, wanted):
    """On a GPU experts are looked for in host memory if they are not in its pool, on a CPU all of them are."""
    work = ["workload.batch_size=1", "workload.gen_len=3", "workload.prompt_len=16"]
    on = machine("measured") if device == "cuda" else machine("measured", device="cpu", gpu_memory_bytes=None)
    plan = make_plan("model=mixtral-8x7b", "engine=stream", "quant=int4", "offload=nvme", *work, on=on)
    spread = figures(measured((2.0, 9.0, 9.0)), plan)
    copied = (40, 40 * 10**8) if device == "cuda" else (0, 0)
    one = Pass(ttft_s=2.0, total_s=20.0, step_s=[9.0, 9.0], routed=Routed(64, 100, *copied, 30, 30 * 10**8))
    got = figures(Samples(load_s=1.0, warmup=[], measured=[one, one]), plan)

    assert got.expert_host_hit_rate == 1 - 60 / wanted
    assert (got.expert_hit_rate is None) == (device == "cpu")
    assert got.disk_bytes_per_s == pytest.approx(60 * 10**8 / 4 / 9)
    ratio = 60 * 10**8 / 4 / plan.disk_bytes_per_step
    assert got.fraction_of_bound == pytest.approx(ratio * spread.fraction_of_bound)
    assert (got.decode_prediction_error < spread.decode_prediction_error) == (ratio < 1)
