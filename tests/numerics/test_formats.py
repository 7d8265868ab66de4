"""Each format of quantized weights, with each engine: docs/checkpoints.md says what becomes of it."""

import json

import pytest
from cli import run_script
from formats import CELLS, FORMATS
from places import DOCS

PAGE = DOCS / "checkpoints.md"
pytestmark = pytest.mark.timeout(1800)  # the first one waits for all of them, and for operators to be compiled
EQUAL = "runs, equal to plain transformers"
ALL = [(name, *cell) for name in FORMATS for cell in CELLS]
NATIVE, *REST = CELLS
# what `make test` computes: two cells of each format, so that each cell meets several, and whether it keeps its codes
CHOSEN = {(name, *REST[(number + more) % len(REST)]) for number, name in enumerate(FORMATS) for more in (0, 3)}
CHOSEN |= {(name, *NATIVE) for name in FORMATS}
KEEPS_CODES = {name for name in FORMATS if name.startswith(("FP8", "MX", "compressed-tensors, INT4"))}
# of a parameter, as each format's specification says: codes, and scales and zeros over the size of their groups
BITS = {
    "MXFP8": 8 + 8 / 32,
    "MXFP4": 4 + 8 / 32,
    "compressed-tensors, INT4 in groups of 32": 4 + 16 / 32,
    "AWQ, 4 bits": 4 + (16 + 4) / 64,
    "bitsandbytes, NF4": 4 + 32 / 64,
}
HEADER = """
## Formats of quantized weights

Each row is a tiny checkpoint, written as the format is on disk: by the formulas of its specification, or by the package that
owns the format (compressed-tensors, gguf). `equal` is as above. The reference is plain transformers with `dequantize=True`.
For GPTQ, AWQ and bitsandbytes, which transformers does not expand while it loads, and for FP8 whose last blocks are not whole,
which it misreads or refuses, it is a 16-bit checkpoint that the tests write beside it from the codes. The verification of a
run then goes layer by layer, and shares the expansion with the engine: the console says so.

Weights are read one at a time, stacked experts one expert at a time, expanded to the run's type on the device, and then kept
in 16 bits or quantized as `quant` says. No second model is in memory or on disk. With `quant=native`, which `stream` alone
has, the codes are kept, and expanded before a layer runs. Bits are those that the whole file has for a parameter; embedding
and head are not quantized in these, except in GGUF.

| format | in the record | bits | {columns} |
|---|---|---|{rules}|
"""
REFUSED = """
These are refused before anything is loaded:

| format | message |
|---|---|
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory, every_test):
    """What `formats.py` found: `outcome` by (format, engine, quant, offload), and how each is `stored`."""
    folder = tmp_path_factory.mktemp("formats")
    cells = folder / "cells"
    cells.write_text(json.dumps([cell for cell in ALL if every_test or cell in CHOSEN]))
    lines = run_script("formats.py", folder, cells)
    outcomes = {(line["case"], *line["cell"]): line["outcome"] for line in lines if "cell" in line}
    return outcomes, {line["case"]: line["stored"] for line in lines if "stored" in line}


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, marks=() if cell in CHOSEN else pytest.mark.release) for cell in ALL], ids=str
)
def test_it_runs_and_is_equal_or_is_refused(found, cell):
    outcome = found[0][cell]

    assert outcome == EQUAL or (outcome.startswith("refused: ") and is_refused(found, *cell)), outcome


def is_refused(found, name, *cell) -> bool:
    """Whether a cell should be: nothing expands the format, or nothing keeps its codes."""
    return found[1][name] is None or (tuple(cell) == NATIVE and name not in KEEPS_CODES)


def test_every_cell_is_met():
    assert {tuple(cell[1:]) for cell in CHOSEN} == set(CELLS)


@pytest.mark.parametrize("name", BITS)
def test_the_bits_are_those_of_the_format(found, name):
    """The rest of the model, most of it embeddings, has 16."""
    stored = found[1][name]

    assert BITS[name] < stored["bits_per_parameter"] < 16
    assert stored["is_quantized"]


@pytest.mark.release
def test_the_page_says_what_was_found(found, pytestconfig):
    outcomes, stored = found
    columns = [f"{engine} {quant}, {offload}" for engine, quant, offload in CELLS]
    page = HEADER.format(columns=" | ".join(columns), rules="|".join(["---"] * len(columns)))
    for name in [name for name in FORMATS if stored[name]]:
        words = ["equal" if outcomes[name, *cell] == EQUAL else "refused" for cell in CELLS]
        bits = f"{stored[name]['bits_per_parameter']:.2f}"
        page += f"| {name} | {stored[name]['format']} | {bits} | {' | '.join(words)} |\n"
    page += REFUSED
    for name, *cell in [each for each in ALL if outcomes[each] != EQUAL and (stored[each[0]] or each[1:] == CELLS[0])]:
        what = f"{name}, `quant={cell[1]}`" if stored[name] else name
        page += f"| {what} | {outcomes[name, *cell]} |\n"
    before = PAGE.read_text().partition(page.splitlines()[1])[0].rstrip() + "\n"
    if pytestconfig.getoption("update_golden"):
        PAGE.write_text(before + page)

    assert PAGE.read_text() == before + page


def test_the_page_has_each_format_with_its_outcome(found):
    """Of the cells that are computed; all of them are compared by `make test-all`."""
    page = PAGE.read_text()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines()}
    for (name, *_), outcome in found[0].items():
        assert " equal " in rows[name] if outcome == EQUAL else f" | {outcome} |" in page
