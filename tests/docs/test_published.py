"""docs/published.md: published throughputs against the bounds of the machines they were measured on."""

from dataclasses import replace

import published
import pytest

from zi_experiments.cost_model.bound import lower_bound
from zi_experiments.system import machines

ROWS = [row for table in published.load() for row in table.rows]


def test_the_page_is_what_is_generated(pytestconfig):
    page = published.page(published.load())
    if pytestconfig.getoption("update_golden"):
        published.PAGE.write_text(page)

    assert published.PAGE.read_text() == page


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_nothing_published_passes_its_bound(row):
    plan = published.plan_of(row)
    bound = published.bound_of(row, plan)

    assert row.value > 0
    assert (bound is None) == (lower_bound(plan).unknown == ("disk_bytes_per_s",)), "which not all have published"
    assert bound is None or row.value <= bound


@pytest.mark.parametrize("row", [row for row in ROWS if row.kv], ids=lambda row: str(row.number))
def test_keys_and_values_that_do_not_count_do_not_bound(row):
    """They are in the GPU's memory there, whose rate may then not be what limits, nor may they cross the link."""
    plan = published.plan_of(row)

    assert lower_bound(plan).limited_by in ("link", "disk")
    assert plan.link_bytes_per_pass == plan.streamed_bytes_per_pass


def test_the_commands_of_the_page_are_those_of_its_rows():
    commands = [line for line in published.PAGE.read_text().splitlines() if line.startswith("python -m ")]

    assert commands == [f"python -m zi_experiments {' '.join(row.overrides)}  # {row.number}" for row in ROWS]
    assert all("plan_only=true" in row.overrides for row in ROWS)


@pytest.mark.parametrize("table", published.load(), ids=lambda table: table.title)
def test_a_reader_without_a_gpu_plans_for_the_same_machine(table):
    if machines.gpu_count():
        pytest.skip("a GPU that is here would count")
    described = published.compose(table.rows[0].overrides).hardware
    detected = machines.detect(described)

    assert replace(detected, gpu_name=described.gpu, gpus_visible=1) == published.described_machine(described)


def test_a_machine_is_what_its_file_says(compose_run):
    run = compose_run("hardware=a6000", "hardware.host_memory_gib=252")
    machine = published.described_machine(run.hardware)

    assert machine.gpu_memory_bytes == int(47.5 * (1 << 30))
    assert machine.host_memory_bytes == 252 * (1 << 30)
    assert machine.ceilings.link_bytes_per_s == 31.5e9
    with pytest.raises(AssertionError):  # this machine's memory is nobody's who published
        published.described_machine(compose_run("hardware=a6000").hardware)


def test_throughput_as_publications_define_it():
    """64 sequences, 10 tokens each; 5 s of prefill and 9 steps of 3 s."""
    assert published.bound_tok_per_s(64, 10, 5.0, 3.0, "total_tok_per_s") == pytest.approx(640 / 32)
    assert published.bound_tok_per_s(64, 10, 5.0, 3.0, "decode_tok_per_s") == pytest.approx(64 / 3)


def test_what_is_typed_for_a_row():
    row = {"system": "FlexGen", "value": 7, "batch": 12, "run": "model=opt-30b offload=none", "kv": "host"}
    table = {key: key for key in ("title", "machine", "source", "about", "figure")}
    table |= {"run": ["hardware=t4", "offload=cpu"], "systems": {"FlexGen": "engine=stream"}, "rows": [row]}
    (made,) = published.tables([table])

    assert made.rows[0].overrides == (
        *("plan_only=true", "hardware=t4", "offload=none", "engine=stream", "model=opt-30b"),
        *("workload.batch_size=12", "hardware.memory_gib=1000"),
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_no_placement_passes_the_bound_of_the_machine(row):
    plan = published.plan_of(row)
    machine, placed = published.machine_bound_of(row, plan), published.bound_of(row, plan)

    assert machine is None or row.value <= machine
    assert None in (machine, placed) or row.kv or placed <= machine, "one placement is no faster than all"
