"""Every family, quantization and offload computes what plain transformers does, bit for bit, as docs/families.md says."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from itertools import product

import pytest
from cli import run_script
from families import ALL, FAMILIES, OFFLOADS, QUANTS, STREAMED, Cell, by_deepspeed, by_stream, chosen
from places import DOCS

PAGE = DOCS / "families.md"
CHOSEN = chosen()  # what `make test` computes
pytestmark = pytest.mark.timeout(1800)  # the first one waits for all families, and for operators to be compiled

HEADER = """# Families

Written by `make test-all ARGS="tests/numerics/test_families.py --update-golden"` from what the tests compute, and
compared with it by every `make test-all`.

Each cell is a tiny model of the family, built on the spot: a float16 checkpoint, loaded by an engine for a bfloat16 run, and
the same checkpoint in plain transformers, its matrices quantized and expanded by code of the tests' own. `equal` means that
logits and greedy tokens are equal bit for bit, and that the verification of every run agrees. Bits are those of a parameter
as stored, scales and minima included, group size 64.

## engine=deepspeed

Those of the families up to deepseek_v3, and some with other groups, were computed in float16 on an H200 as well: logits and
tokens are equal in all of them ([`families-h200.json`](results/families-h200.json)).

| family | quantized | int4 bits | int8 bits | {columns} |
|---|---|---|---|{rules}|
"""
STREAM_HEADER = """
## engine=stream

| family | {columns} |
|---|{rules}|
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory, every_test):
    """What `families.py` found of each cell; two processes share the families."""
    folder = tmp_path_factory.mktemp("families")
    wanted, names = ALL if every_test else CHOSEN, list(FAMILIES)

    def share(number):
        cells = folder / f"cells{number}"
        cells.write_text(json.dumps([asdict(cell) for cell in wanted if names.index(cell.family) % 2 == number]))
        return run_script("families.py", folder, cells)

    with ThreadPoolExecutor() as both:
        found = [result for results in both.map(share, (0, 1)) for result in results]
    return {Cell(**{field.name: result[field.name] for field in fields(Cell)}): result for result in found}


def is_equal(result):
    return result["rel_error"] == 0 and result["tokens_equal"] and result["problem"] is None


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, marks=() if cell in CHOSEN else pytest.mark.release) for cell in ALL], ids=str
)
def test_what_is_computed_and_stored(results, cell):
    """Stored by parameter, and in bytes: an engine's inventory against what the test itself finds in memory and on disk."""
    result = results[cell]

    assert is_equal(result), result
    assert result["difference"] is None
    assert result["held_bytes"] == result["stored_bytes"] == result["planned_bytes"]
    assert result["held_bytes"] == result["parameter_bytes"] + result["padding_bytes"]
    assert result["disk_bytes"] == result["planned_disk_bytes"]
    assert (result["disk_bytes"] > 0) == (cell.offload == "nvme")
    assert result["quantized_fraction"] > 0.9 or cell.quant == "fp16"
    if cell.engine == "deepspeed":
        assert (result["misplaced"] is not None) == (cell.offload == "nvme")


def test_every_setting_is_met():
    """What `make test` leaves to `make test-all` are combinations, and no settings."""
    for name in ("quant", "offload", "kv_cache", "group_size", "group_dim", "layout", "resident", "micro_batches"):
        for engine in ("deepspeed", "stream"):
            everything = {getattr(cell, name) for cell in ALL if cell.engine == engine}
            assert {getattr(cell, name) for cell in CHOSEN if cell.engine == engine} >= everything - {"safetensors"}
    assert {cell.family for cell in CHOSEN} == set(FAMILIES)
    pairs = {(cell.engine, cell.quant, cell.offload) for cell in ALL}
    assert {(cell.engine, cell.quant, cell.offload) for cell in CHOSEN} == pairs


@pytest.mark.release
def test_the_page_says_what_was_found(results, pytestconfig):
    columns = [*product(QUANTS, OFFLOADS), ("int4", "cpu, kv_cache=cpu")]
    lines = []
    for family in FAMILIES:
        cells = by_deepspeed(family)
        bits = [
            f"{results[Cell(family=family, quant=q, offload='cpu')]['bits_per_weight']:.2f}" for q in ("int4", "int8")
        ]
        share = results[Cell(family=family, quant="int4", offload="cpu")]["quantized_fraction"]
        words = [f"{100 * share:.1f} %", *bits, *map(word, map(results.get, cells))]
        lines.append(f"| {family} | {' | '.join(words)} |\n")
    header = HEADER.format(columns=" | ".join(map(" ".join, columns)), rules="|".join(["---"] * len(columns)))
    page = header + "".join(lines) + streamed_table(results)
    if pytestconfig.getoption("update_golden"):
        PAGE.write_text(page)

    assert PAGE.read_text() == page


def word(result):
    return "equal" if is_equal(result) else "**differs**"


def streamed_table(results):
    columns = []
    for quant, offload, kv_cache, resident, micro_batches in STREAMED:
        settings = [f"resident={resident}"] * (resident > 0) + [f"kv_cache={kv_cache}"] * (kv_cache != "gpu")
        settings += [f"micro_batches={micro_batches}"] * (micro_batches > 1)
        columns.append(", ".join([f"{quant} {offload}", *settings]))
    lines = [f"| {family} | {' | '.join(word(results[cell]) for cell in by_stream(family))} |\n" for family in FAMILIES]
    return STREAM_HEADER.format(columns=" | ".join(columns), rules="|".join(["---"] * len(columns))) + "".join(lines)
