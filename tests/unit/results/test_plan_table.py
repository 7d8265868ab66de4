"""What `plan_only=true` prints of a plan."""

import io

import pytest
from rich.console import Console

from zi_experiments.cost_model.bound import lower_bound
from zi_experiments.cost_model.prediction import predict, total_tok_per_s
from zi_experiments.results.sinks import plan_table

RUN = ("model=opt-13b", "engine=stream", "offload=cpu", "quant=fp16", "plan_only=true", "hardware.price_per_hour=36")


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_machine_that_was_not_measured_has_the_most_tokens_and_the_least_cost(make_plan, machine, nodes):
    """Machines by the hour: two cost twice as much, and are twice as fast for twice the sequences."""
    size = (f"hardware.num_gpus={nodes}", f"launch.nnodes={nodes}", f"workload.batch_size={8 * nodes}")
    plan = make_plan(*RUN, *size, on=machine("h200"))
    bound, console = lower_bound(plan), Console(file=io.StringIO(), width=150)
    most = total_tok_per_s(plan, bound.prefill_s, bound.decode_step_s)

    plan_table.show(plan, predict(plan), [], console)

    text = console.file.getvalue()
    assert f"at most {most:,.2f} tok/s" in text
    assert f"{nodes * 10_000 / most:,.2f} " in text.partition("cost per million tokens")[2]


def test_a_measured_machine_has_the_predicted_ones(make_plan, machine):
    plan, console = make_plan(*RUN, on=machine("measured")), Console(file=io.StringIO(), width=150)

    plan_table.show(plan, predict(plan), [], console)

    assert "at most" not in console.file.getvalue()
    assert f"{predict(plan).cost_per_million_tokens:,.2f} " in console.file.getvalue()
