"""Every family, quantization and offload computes what plain transformers does, bit for bit, as docs/families.md says."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from families import FAMILIES, GROUPED_FAMILIES, GROUPS, LAYOUTS, OFFLOADS, QUANTS, STREAMED, STREAMED_GROUPS

DOCS = Path(__file__).parents[1] / "docs" / "families.md"
pytestmark = pytest.mark.timeout(1800)  # the first one waits for all families, and for operators to be compiled

HEADER = """# Families

Written by `make test ARGS="tests/test_families.py --update-golden"`, from what the tests compute, and compared with it by
every `make test`.

Each cell is a tiny model of the family, built on the spot: a float16 checkpoint, loaded by an engine for a bfloat16 run, and
the same checkpoint in plain transformers, its matrices quantized and expanded by code of the tests' own. `equal` means that
logits and greedy tokens are equal bit for bit, and that the verification of every run agrees. Bits are those of a parameter
as stored, scales and minima included, group size 64.

## engine=deepspeed

The same cells, and some with other groups, in float16 on an H200: logits and tokens are equal in all of them
([`families-h200.json`](results/families-h200.json)).

| family | quantized | int4 bits | int8 bits | {columns} |
|---|---|---|---|{rules}|
"""
STREAM_HEADER = """
## engine=stream

| family | {columns} |
|---|{rules}|
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What `families.py` found, by (family, quant, offload); two processes share the families."""
    script = Path(__file__).parent / "families.py"
    folder = tmp_path_factory.mktemp("families")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    shares = [list(FAMILIES)[start::2] for start in (0, 1)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), *share],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=(folder / f"{share[0]}.log").open("w"),
        )
        for share in shares
    ]
    lines = [line for process in processes for line in process.communicate()[0].splitlines()]
    for process, share in zip(processes, shares, strict=True):
        assert process.returncode == 0, (folder / f"{share[0]}.log").read_text()[-3000:]
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return {key(**result): result for result in found}


def key(
    family,
    quant,
    offload,
    kv_cache="gpu",
    group_size=64,
    group_dim=1,
    layout=None,
    engine="deepspeed",
    resident=0,
    micro_batches=1,
    **figures,
):
    return family, quant, offload, kv_cache, group_size, group_dim, layout, engine, resident, micro_batches


def streamed(family, quant, offload, kv_cache, resident, micro_batches):
    return key(family, quant, offload, kv_cache, engine="stream", resident=resident, micro_batches=micro_batches)


def is_equal(result):
    return result["rel_error"] == 0 and result["tokens_equal"] and result["problem"] is None


def assert_stored_as_planned(result):
    """By parameter, and in bytes; the inventory of an engine against what the test itself finds in memory and on disk."""
    assert result["difference"] is None
    assert result["held_bytes"] == result["stored_bytes"] == result["planned_bytes"]
    assert result["held_bytes"] == result["parameter_bytes"] + result["padding_bytes"]
    assert result["disk_bytes"] == result["planned_disk_bytes"]


@pytest.mark.parametrize(("family", "quant", "offload"), product(FAMILIES, QUANTS, OFFLOADS))
def test_what_is_computed_and_stored(results, family, quant, offload):
    result = results[key(family, quant, offload)]

    assert is_equal(result), result
    assert_stored_as_planned(result)
    assert (result["disk_bytes"] > 0) == (offload == "nvme")
    assert (result["misplaced"] is not None) == (offload == "nvme")
    assert result["quantized_fraction"] > 0.9 or quant == "fp16"


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_in_host_memory(results, family):
    assert is_equal(results[key(family, "int4", "cpu", "cpu")])


@pytest.mark.parametrize(("family", "quant", "groups"), [(f, q, g) for f in GROUPED_FAMILIES for q, g in GROUPS])
def test_other_groups(results, family, quant, groups):
    result = results[key(family, quant, "cpu", "gpu", *groups)]

    assert is_equal(result), result
    assert_stored_as_planned(result)


@pytest.mark.parametrize(("family", "cell"), product(FAMILIES, STREAMED))
def test_what_is_streamed(results, family, cell):
    """Held are whole slabs: what is outside of layers, those that stay, those in host memory, and the file on disk."""
    result = results[streamed(family, *cell)]

    assert is_equal(result), result
    assert_stored_as_planned(result)
    assert (result["disk_bytes"] > 0) == ("nvme" in cell)


@pytest.mark.parametrize(("family", "groups"), product(GROUPED_FAMILIES, STREAMED_GROUPS))
def test_other_groups_are_streamed(results, family, groups):
    quant, (size, dim) = groups
    result = results[key(family, quant, "cpu", "gpu", size, dim, engine="stream")]

    assert is_equal(result), result
    assert_stored_as_planned(result)


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_other_checkpoints(results, family, layout):
    """fp32, the run's own type, several files and pickled ones; alone, DeepSpeed makes noise or an error of most."""
    result = results[key(family, "int4", "nvme", layout=layout)]

    assert is_equal(result), result
    assert result["disk_bytes"] == result["planned_disk_bytes"] > 0


def test_the_page_says_what_was_found(results, pytestconfig):
    columns = [*product(QUANTS, OFFLOADS), ("int4", "cpu", "cpu")]
    lines = []
    for family in FAMILIES:
        cells = ["equal" if is_equal(results[key(family, *column)]) else "**differs**" for column in columns]
        bits = [f"{results[key(family, quant, 'cpu')]['bits_per_weight']:.2f}" for quant in ("int4", "int8")]
        share = f"{100 * results[key(family, 'int4', 'cpu')]['quantized_fraction']:.1f} %"
        lines.append(f"| {family} | {share} | {' | '.join(bits)} | {' | '.join(cells)} |\n")
    header = HEADER.format(
        columns=" | ".join([*map(" ".join, product(QUANTS, OFFLOADS)), "int4 cpu, kv_cache=cpu"]),
        rules="|".join(["---"] * len(columns)),
    )
    page = header + "".join(lines) + streamed_table(results)
    if pytestconfig.getoption("update_golden"):
        DOCS.write_text(page)

    assert DOCS.read_text() == page


def streamed_table(results):
    columns = []
    for quant, offload, kv_cache, resident, micro_batches in STREAMED:
        settings = [f"resident={resident}"] * (resident > 0) + [f"kv_cache={kv_cache}"] * (kv_cache != "gpu")
        settings += [f"micro_batches={micro_batches}"] * (micro_batches > 1)
        columns.append(", ".join([f"{quant} {offload}", *settings]))
    lines = []
    for family in FAMILIES:
        cells = ["equal" if is_equal(results[streamed(family, *cell)]) else "**differs**" for cell in STREAMED]
        lines.append(f"| {family} | {' | '.join(cells)} |\n")
    return STREAM_HEADER.format(columns=" | ".join(columns), rules="|".join(["---"] * len(columns))) + "".join(lines)
