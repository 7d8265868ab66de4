"""What `auto` decides, against all that it could have decided."""

from dataclasses import replace

import pytest

from zi_experiments.cost_model.bound import step_bytes
from zi_experiments.cost_model.prediction import predict

CHOICES = ("engine=stream", "model=opt-13b", "quant=fp16", "workload=zero-inference")


@pytest.fixture
def plan_on(make_plan, machine):
    """`plan_on(compute, layer_s, …)` → the plan on a machine whose cores take so long for a layer."""

    def plan_on(compute, layer_s, *overrides, memory=None, **known):
        measured = machine("measured", host_memory_bytes=256 << 30)
        measured = replace(measured, ceilings=replace(measured.ceilings, host_memory_bytes_per_s=memory))
        rates = {"host_layer_s": layer_s, "host_layer_busy_s": layer_s and 1.1 * layer_s, "link_busy_bytes_per_s": 45e9}
        on = replace(measured, calibration=replace(measured.calibration, **rates | known))
        return make_plan(*CHOICES, f"offload.compute={compute}", *overrides, on=on)

    return plan_on


@pytest.mark.parametrize("layer_s", [0.002, 0.008, 0.03])
def test_auto_is_the_fastest_share_by_prediction(plan_on, layer_s):
    chosen = plan_on("auto", layer_s)
    all_s = [predict(plan_on(layers / 40, layer_s)).decode_step_s for layers in range(41)]

    assert predict(chosen).decode_step_s == min(all_s)
    assert chosen.run.offload.compute == len(chosen.storage.host_layers) / 40
    assert predict(chosen).decode_step_on_gpu_s == all_s[0]


def test_a_slow_host_computes_nothing(plan_on):
    plan = plan_on("auto", 2.0)

    assert plan.run.offload.compute == 0
    assert plan.storage.host_layers == ()


@pytest.mark.parametrize("overrides", [(), ("model=mixtral-8x7b", "quant=int4", "workload.batch_size=1")])
def test_the_plan_says_that_nobody_has_measured_the_host(plan_on, overrides):
    plan = plan_on("auto", None, *overrides)

    assert plan.storage.host_layers == ()
    assert plan.storage.host_experts == 0
    assert "compute on the GPU: nobody has measured how fast the host computes" in " ".join(plan.notes)


def test_a_small_gain_is_none(plan_on):
    """It would be an error of the prediction."""
    assert 0.97 < predict(plan_on(4 / 40, 0.1)).decode_step_s / predict(plan_on(0, 0.1)).decode_step_s < 1

    assert plan_on("auto", 0.1).storage.host_layers == ()


EXPERTS = ("model=mixtral-8x7b", "quant=int4", "workload.batch_size=1")


@pytest.mark.parametrize(("host", "part"), [(60e9, 1 / 2), (30e9, 1 / 2), (5e9, 0)])
def test_auto_lets_experts_and_copies_end_together(plan_on, host, part):
    """Of the two experts of a token one is copied, unless the host takes longer for it than both take to cross."""
    known = {"host_experts_bytes_per_s": host, "link_busy_bytes_per_s": 45e9}
    plan, usual = (plan_on(share, None, *EXPERTS, **known) for share in ("auto", "gpu"))

    assert plan.storage.host_bytes_per_step == pytest.approx(part * usual.streamed_bytes_per_step)
    assert plan.run.offload.compute == (host / (host + 45e9) if part else 0)
    assert predict(plan).decode_step_on_gpu_s == pytest.approx(predict(usual).decode_step_s)
    assert (predict(plan).decode_step_s < predict(usual).decode_step_s) == (part > 0)


def test_host_memory_that_gives_no_more_makes_a_step_no_faster(plan_on):
    """Layers and experts of the host are read from the memory from which others cross."""
    for what, known in (
        (("model=opt-13b",), {"host_layer_s": 0.004}),
        (EXPERTS, {"host_experts_bytes_per_s": 90e9, "link_busy_bytes_per_s": 45e9}),
    ):
        free, bounded = (plan_on(0.5, None, *what, **known, memory=memory) for memory in (None, 60e9))
        on_host = bounded.storage.host_bytes_per_step or 0.5 * step_bytes(bounded)
        read = bounded.link_bytes_per_pass + on_host
        assert predict(free).decode_step_s < read / 60e9
        assert predict(bounded).decode_step_s >= read / 60e9
        assert predict(bounded).limited_by == "memory"


def test_auto_is_decided_for_the_batch_that_is(plan_on):
    plan = plan_on("auto", 0.008, "workload.batch_size=auto")

    assert isinstance(plan.run.workload.batch_size, int)
    assert plan.storage.host_layers
