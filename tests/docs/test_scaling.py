"""docs/scaling.md: what more GPUs and machines bring, as predicted and as measured."""

import pytest
import scaling
from predictions import compare, runs

from zi_experiments.cost_model.bound import lower_bound
from zi_experiments.cost_model.prediction import predict


@pytest.fixture(scope="module")
def plans():
    """Of OPT-175B, by GPUs."""
    return {gpus: scaling.plan_of("opt-175b", gpus) for gpus in (1, 2, 4, 8, 16, 1024)}


def test_within_a_machine_links_add_up_until_computing_takes_longer(plans):
    steps = {gpus: predict(plan).decode_step_s for gpus, plan in plans.items()}
    link = plans[1].machine.ceilings.link_bytes_per_s

    assert [scaling.limit(plans[gpus], steps[gpus]) for gpus in (1, 2, 4, 8)] == [
        "links",
        "links",
        "links",
        "computing",
    ]
    for gpus in (1, 2, 4):
        assert steps[gpus] == pytest.approx(plans[1].placement.cpu_bytes / gpus / link, rel=0.03)
    assert lower_bound(plans[8]).decode_step_s < 0.8 * steps[8] < 0.8 * steps[4]


def test_machines_multiply_what_one_does(plans):
    found = {gpus: predict(plan) for gpus, plan in plans.items()}

    for gpus in (16, 1024):
        assert plans[gpus].run.launch.nnodes == gpus // 8
        assert found[gpus].decode_step_s == pytest.approx(found[8].decode_step_s)
        assert found[gpus].total_tok_per_s == pytest.approx(gpus / 8 * found[8].total_tok_per_s)


def test_the_page_is_what_is_generated(pytestconfig):
    page = scaling.page(scaling.load())
    if pytestconfig.getoption("update_golden"):
        scaling.PAGE.write_text(page)
    assert scaling.PAGE.read_text() == page


@pytest.mark.parametrize(("gathers", "count", "most"), [(False, 4, 0.1), (True, 1, 0.2)])
def test_what_was_measured_is_near_what_is_predicted(gathers, count, most):
    """A gathered step takes longer than predicted, which the page says. DeepSpeed's gathers are not predicted."""
    compared = [one for one in map(compare, runs(scaling.load())) if one.plan.run.engine.name == "stream"]
    errors = [abs(one.step_error) for one in compared if (one.plan.storage.gathered_bytes > 0) is gathers]

    assert len(errors) == count
    assert max(errors) < most
