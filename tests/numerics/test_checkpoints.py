"""What becomes of checkpoints that people have trouble with: docs/checkpoints.md says it, for two engines."""

from itertools import product

import pytest
from checkpoints import CASES, ENGINES
from cli import run_script
from places import DOCS

PAGE = DOCS / "checkpoints.md"
pytestmark = pytest.mark.timeout(1800)  # the first one waits for all of them, and for operators to be compiled
EQUAL = "runs, equal to plain transformers"
FORMATS = "\n## Formats of quantized weights\n"  # what follows is written by test_formats.py
HEADER = """# Checkpoints

Written by `make test-all ARGS="-n 0 tests/numerics -k 'checkpoints or formats' --update-golden"` from what the tests find,
and compared with it by every `make test`.

Each row is a tiny checkpoint, built on the spot: one of Llama unless it says otherwise. `equal` means that logits and greedy
tokens are those of `AutoModelForCausalLM.from_pretrained(folder)` bit for bit, as they are and with its matrices quantized and
expanded by code of the tests' own, and that the verification of every run agrees: `quant=int4` with `offload=cpu`, and
`quant=fp16` with `offload=nvme`. What is refused is refused before anything is loaded, in that line.

| checkpoint | engine | outcome |
|---|---|---|
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What `checkpoints.py` found, by (checkpoint, engine)."""
    found = run_script("checkpoints.py", tmp_path_factory.mktemp("checkpoints"))
    return {(each["case"], each["engine"]): each["outcome"] for each in found}


@pytest.mark.parametrize(("case", "engine"), product(CASES, ENGINES))
def test_it_runs_and_is_equal_or_is_refused(outcomes, case, engine):
    outcome = outcomes[case, engine]

    assert outcome == EQUAL or outcome.startswith("refused: "), outcome
    assert " / " not in outcome, "one outcome, whatever the quantization and the offload"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("one of three layers is not in `config.json`", "would leave out (model.layers.2.input_layernorm.weight, "),
        ("FP8, without its `quantization_config`", "would leave out (model.layers.0.mlp.down_proj.weight_scale_inv, "),
        ("the head is missing", "lacks tensors that its config.json asks for (lm_head.weight)"),
        ("another vocabulary in `config.json`", "(lm_head.weight [8192, 256] where the model has [8256, 256], "),
    ],
)
def test_what_does_not_fit_is_named(outcomes, case, said):
    for engine in ENGINES:
        assert said in outcomes[case, engine]


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("tied")])
def test_a_head_that_may_be_tied_is_what_transformers_makes_of_it(outcomes, case):
    assert {outcomes[case, engine] for engine in ENGINES} == {EQUAL}


def test_the_page_says_what_was_found(outcomes, pytestconfig):
    page = HEADER
    for case in CASES:
        found = {engine: outcomes[case, engine] for engine in ENGINES}
        same = len(set(found.values())) == 1
        for engine, outcome in [("both", found["stream"])] if same else found.items():
            page += f"| {case} | {engine} | {outcome} |\n"
    _, title, formats = PAGE.read_text().partition(FORMATS)
    if pytestconfig.getoption("update_golden"):
        PAGE.write_text(page + title + formats)

    assert PAGE.read_text().partition(FORMATS)[0] == page
