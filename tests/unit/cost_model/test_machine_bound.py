"""The bound over all placements, against brute force over shares, the bounds of placements, and faster machines."""

from dataclasses import replace
from itertools import product
from math import inf

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zi_experiments.config.schema import Calibration, Ceilings
from zi_experiments.cost_model.bound import lower_bound
from zi_experiments.cost_model.machine_bound import machine_bound_s

near = pytest.approx
RATES = ("link_bytes_per_s", "hbm_bytes_per_s", "flops", "host_memory_bytes_per_s", "disk_bytes_per_s")
NOTHING = dict.fromkeys(field for field in Calibration.__dataclass_fields__) | {"gemm_flops": {}}
H100 = {"link": 50e9, "hbm": 3e12, "flops": 8e14, "memory": 160e9, "disk": 5e9, "cores": 140e9}
plans_are_kept = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
SHARES = [step / 20 for step in range(21)]


@pytest.fixture
def on_machine(make_plan, machine):
    """`on_machine(*overrides, rates={…}, gpu=bytes)` → a plan of OPT-13B, 16 bits in host memory."""
    plans = {}

    def on_machine(*overrides, rates=H100, gpu=80e9):
        known = Calibration(**(NOTHING | {"host_read_bytes_per_s": rates["cores"]}))
        ceilings = Ceilings(rates["link"], rates["hbm"], rates["flops"], rates["disk"], rates["memory"], "by hand")
        if overrides not in plans:
            work = ("engine=stream", "model=opt-13b", "quant=fp16", "offload=cpu", "workload=zero-inference")
            plans[overrides] = make_plan(*work, *overrides, on=machine())
        plan = plans[overrides]
        here = replace(plan.machine, ceilings=ceilings, calibration=known, gpu_memory_bytes=int(gpu))
        return replace(plan, machine=here)

    return on_machine


def work_of(plan):
    """Bytes and operations of a step, and operations for a byte of 16-bit weights, from the model's shape."""
    run, numel = plan.run.workload, 40 * 12 * 5120**2
    kv = run.sequences * 2 * 40 * 5120 * run.prompt_len
    return 2 * (numel + kv), 2 * numel * run.sequences, run.sequences


def least_of_shares(plan, rates, gpu):
    """The least time over shares of the bytes in the GPU's memory, over the link, and read by the cores."""
    moved, operations, each = work_of(plan)
    least = inf
    for here, crossing in product(SHARES, SHARES):
        there = 1 - here - crossing
        if there < -1e-9 or here * moved > gpu:
            continue
        there = max(there, 0)
        least = min(
            least,
            max(
                here * moved / rates["hbm"],
                crossing * moved / rates["link"],
                there * moved / rates["cores"],
                (crossing + there) * moved / rates["memory"],
                max(operations / 2, operations - each * there * moved) / rates["flops"],
            ),
        )
    return least


rates_of_machines = st.fixed_dictionaries(
    {
        "link": st.floats(1e9, 1e12),
        "hbm": st.floats(1e10, 1e13),
        "flops": st.floats(1e11, 1e15),
        "disk": st.just(1e9),
        "cores": st.floats(1e9, 5e11),
        "memory": st.floats(5e11, 1e12),
    }
).map(lambda rates: rates | {"memory": max(rates[part] for part in ("memory", "link", "cores"))})


@plans_are_kept
@given(rates=rates_of_machines, gpu=st.floats(1e9, 5e10), batch=st.sampled_from((1, 16)))
def test_it_is_the_least_over_all_shares(on_machine, rates, gpu, batch):
    """Of a grid of shares, whose best is at most a step of the grid slower than the best of all."""
    plan = on_machine(f"workload.batch_size={batch}", rates=rates, gpu=gpu)
    found, brute = machine_bound_s(plan), least_of_shares(plan, rates, gpu)
    moved, _, each = work_of(plan)
    slowest = min(rates["link"], rates["cores"], rates["hbm"])
    step_s = 3 / 20 * max(moved / slowest, each * moved / rates["flops"])

    assert found <= brute * (1 + 1e-6)
    assert brute - found <= step_s


@plans_are_kept
@given(
    rates=rates_of_machines,
    times=st.floats(1.001, 100),
    share=st.sampled_from((0, 0.25, 0.5, 1)),
    resident=st.sampled_from((0, 0.3, 0.9)),
)
def test_no_placement_has_a_lower_bound(on_machine, rates, times, share, resident):
    """On a GPU that has room for what the placement keeps there, or for so many times of it."""
    on_host = share * (1 - resident)  # what stays on the GPU is not the host's
    choices = (f"offload.compute={on_host}", f"offload.resident={resident}")
    plan = on_machine(*choices, rates=rates)
    held = plan.placement.gpu_bytes + plan.kv_cache_bytes - plan.storage.host_kv_bytes
    plan = on_machine(*choices, rates=rates, gpu=times * held)
    placed = lower_bound(plan).decode_step_s

    assert machine_bound_s(plan) <= placed * (1 + 1e-6)


@plans_are_kept
@given(rates=rates_of_machines, gpu=st.floats(1e9, 5e10), which=st.sampled_from(sorted(H100)), times=st.floats(1, 10))
def test_no_faster_part_makes_it_longer(on_machine, rates, gpu, which, times):
    slow = machine_bound_s(on_machine(rates=rates, gpu=gpu))

    assert machine_bound_s(on_machine(rates=rates | {which: times * rates[which]}, gpu=gpu)) <= slow * (1 + 1e-6)
    assert machine_bound_s(on_machine(rates=rates, gpu=times * gpu)) <= slow * (1 + 1e-6)


def test_cores_and_link_share_the_hosts_memory(on_machine):
    """A GPU of 10 GB: the rest of the weights and of the KV cache is read at 160 GB/s."""
    plan = on_machine("workload.batch_size=1", gpu=10e9)
    moved, *_ = work_of(plan)

    assert machine_bound_s(plan) == near((moved - 10e9) / 160e9)
    assert machine_bound_s(on_machine("workload.batch_size=1", rates=H100 | {"memory": 500e9}, gpu=10e9)) == near(
        (moved - 10e9) / 190e9
    )


def test_what_no_memory_has_room_for_comes_from_the_disk(on_machine):
    plan = on_machine("workload.batch_size=1", gpu=10e9)
    small = replace(plan, machine=replace(plan.machine, host_memory_bytes=10_000_000_000))
    moved, *_ = work_of(plan)

    assert machine_bound_s(small) == near((moved - 20e9) / 5e9)


@pytest.mark.parametrize("name", ["link", "hbm", "flops"])
def test_an_unknown_rate_is_not_an_endless_one(on_machine, name):
    assert machine_bound_s(on_machine(rates=H100 | {name: None})) is None


def test_one_rate_of_host_memory_is_enough(on_machine):
    """Cores are taken to read as fast as the memory, or they and the link not to share it."""
    plan = on_machine("workload.batch_size=1", gpu=10e9)
    moved, *_ = work_of(plan)
    by_name = {name: on_machine("workload.batch_size=1", rates=H100 | {name: None}, gpu=10e9) for name in H100}

    assert machine_bound_s(by_name["cores"]) == near((moved - 10e9) / 160e9)
    assert machine_bound_s(by_name["memory"]) == near((moved - 10e9) / 190e9)
    assert machine_bound_s(on_machine(rates=H100 | {"cores": None, "memory": None})) is None


def test_a_processor_has_one_memory(make_plan, machine):
    rates = Ceilings(None, 1e11, 1e12, 1e9, None, "by hand")
    plan = make_plan("engine=stream", "model=opt-13b", "quant=fp16", "offload=cpu", on=machine("cpu", ceilings=rates))

    assert machine_bound_s(plan) == near(lower_bound(plan).decode_step_s)
