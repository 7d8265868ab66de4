"""A model that computes something else is found out, by the name of the part that is wrong."""

import re
import weakref

import faults
import pytest
import tiny
import torch
from checkpoints import rewrite, write
from cli import Cli, run_script, wait_for
from families import IDS, group_quantize, load, plain, save_checkpoint

from zi_experiments.config.schema import Quant
from zi_experiments.measurement import reference as references
from zi_experiments.measurement.reference import round_trip
from zi_experiments.measurement.verification import greedy_fraction, rel_error, verify
from zi_experiments.runtime import progress


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """What verification said, by (engine, family, fault)."""
    found = run_script("faults.py", tmp_path_factory.mktemp("faults"))
    return {(engine, family, fault): problem for engine, family, fault, problem in found}


@pytest.mark.parametrize(
    ("engine", "family", "fault", "said"),
    [
        ("stream", "llama", "nothing", None),
        ("stream", "llama", "integers", r"model\.layers\.1 is the first part"),
        ("stream", "llama", "a scale", r"model\.layers\.1 is the first part"),
        ("stream", "llama", "a minimum", r"model\.layers\.0 is the first part .*not finite"),
        ("stream", "llama", "what stays", r"model\.layers\.1 is the first part"),
        ("stream", "llama", "exchanged", r"model\.layers\.0 is the first part"),
        ("stream", "llama", "tokens", "the KV cache is not right"),
        ("deepspeed", "llama", "nothing", None),
        ("deepspeed", "llama", "layer 1", r"model\.layers\.1 is the first part"),
        ("deepspeed", "llama", "both layers", r"model\.layers\.0 is the first part"),
        ("deepspeed", "llama", "scales of another type", r"model\.layers\.1 is the first part"),
        ("deepspeed", "llama", "not a number", r"model\.layers\.0 is the first part .*not finite"),
        ("deepspeed", "llama", "embedding", "the embedding is the first part"),
        ("deepspeed", "llama", "head", "the final norm and head is the first part"),
        ("deepspeed", "llama", "tokens", "generate gives .*the KV cache is not right"),
        ("deepspeed", "mixtral", "nothing", None),
        ("deepspeed", "mixtral", "an expert", r"model\.layers\.1 is the first part"),
        ("deepspeed", "mixtral", "tokens", "the KV cache is not right"),
    ],
)
def test_what_is_wrong_is_named(problems, engine, family, fault, said):
    problem = problems[engine, family, fault]

    if said is None:
        assert problem is None
    else:
        assert re.search(said, problem), problem


def test_weights_that_are_damaged_on_disk_end_the_run(tmp_path):
    """Between loading and measuring, somebody else writes over the file of a weight."""
    cli = Cli(tmp_path)
    process = cli.start("model=deep", "offload=nvme", f"offload.path={tmp_path / 'disk'}", "tracking=none")
    wait_for(process, "load: done")
    (file,) = list((tmp_path / "disk").rglob("*20_param*"))
    with file.open("r+b") as stored:
        stored.write(bytes(file.stat().st_size // 2))
    output, _ = process.communicate()

    assert process.returncode == 1, output
    (result,) = cli.results()
    assert result["status"] == "error"
    assert result["error"]["type"] == "VerificationFailed"
    assert re.search(r"model\.decoder\.layers\.\d+ is the first part", result["error"]["message"]), result["error"]
    assert result["verification"]["passed"] is False
    assert result["metrics"] is None
    assert result["samples"] is None
    assert not list((tmp_path / "disk").iterdir())


def test_a_run_says_that_it_was_not_verified(tmp_path):
    cli = Cli(tmp_path)
    done = cli.run("verify=off", "tracking=none")

    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = cli.results()
    assert result["verification"] is None
    assert result["config"]["verify"] == "off"
    assert "not verified" in done.stdout
    assert "verify:" not in done.stdout


@pytest.fixture
def verified(tmp_path):
    """`verified(change)` → what verification says of a llama whose tensors are as `change` makes them, streamed."""

    def verified(change, quant="fp16"):
        tiny.model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
        rewrite(tmp_path / "checkpoint", change)
        plan, session = load(tmp_path / "checkpoint", quant, "cpu", engine="stream")
        try:
            return verify(session, plan, progress.silent())
        finally:
            session.close()

    return verified


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors[UP][0].fill_(float("nan")),
        lambda tensors: tensors[UP][0].fill_(float("inf")),
        lambda tensors: [tensor.mul_(1e30) for name, tensor in tensors.items() if ".mlp." in name],
    ],
    ids=["not a number", "infinite", "too large"],
)
def test_of_a_model_that_is_not_finite_itself_no_part_of_an_engine_is_to_blame(verified, change):
    found = verified(change)

    assert not found.passed
    assert re.fullmatch(
        r"the model itself computes values that are not finite, in plain transformers too: some of its weights are not "
        r"finite, or too large for bfloat16: pass weights\.path=.*",
        found.problem,
    )
    assert found.max_rel_error is None


def test_tokens_of_plain_generate_are_right_where_a_forward_pass_has_others(tmp_path):
    """RoBERTa counts positions in another way when it generates."""
    write(tmp_path / "checkpoint", "roberta", tiny.SMALL | {"intermediate_size": 48, "is_decoder": True})
    plan, session = load(tmp_path / "checkpoint", "fp16", "cpu", engine="stream")
    try:
        found = verify(session, plan, progress.silent())
        with faults.other_tokens(session) as other:
            wrong = verify(other, plan, progress.silent())
    finally:
        session.close()

    assert found.passed, found.problem
    assert found.tokens_equal
    assert "the KV cache is not right" in wrong.problem


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("shape", [(128, 256), (3, 128, 256)])
def test_the_format_is_what_its_definition_says(bits, group_size, group_dim, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expanded = round_trip(weight, Quant(name="", bits=bits, group_size=group_size, group_dim=group_dim))

    assert torch.equal(expanded, group_quantize(weight, bits, group_size, group_dim))
    groups = (weight if group_dim else weight.mT).unflatten(-1, (-1, group_size))
    error = ((expanded - weight) if group_dim else (expanded - weight).mT).unflatten(-1, (-1, group_size)).abs()
    half_a_step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1) / 2
    assert (error.amax(-1) <= half_a_step * (1 + 1e-9)).all()
    assert (error.amax(-1) > 0.8 * half_a_step).float().mean() > 0.5, "of all the values in a group, one is near a half"


def test_a_group_of_equal_values_is_kept():
    weight = torch.full((2, 64), 0.25, dtype=torch.float16)

    assert torch.equal(round_trip(weight, Quant(name="", bits=4, group_size=64, group_dim=1)), weight)


@pytest.fixture
def reference(make_plan, machine, tmp_path):
    """`reference(family, quant, memory)` → the reference of a checkpoint of that family, in `tmp_path`, and its plan."""
    opened = []

    def reference(family, quant="fp16", memory=1 << 40, change=lambda config: None):
        save_checkpoint(tmp_path, family)
        settings = ["model=local", f"model.path={tmp_path}", "weights=pretrained", "workload=smoke", "engine=stream"]
        plan = make_plan(*settings, "offload=cpu", f"quant={quant}", on=machine("cpu"))
        change(plan.architecture.config)
        opened.append(references.of(plan, torch.device("cpu"), memory))
        return opened[-1]

    yield reference
    for each in opened:
        each.close()


def logits(reference):
    return reference.run(IDS, lambda index, forward, args, kwargs: forward(*args, **kwargs))


@pytest.mark.parametrize(("memory", "kind"), [(1 << 40, "AutoModelForCausalLM"), (0, "layer by layer")])
@pytest.mark.parametrize("quant", ["fp16", "int4"])
@pytest.mark.parametrize("family", ["opt", "mixtral", "gemma2", "gpt2"])
def test_both_references_are_plain_transformers(reference, tmp_path, family, quant, memory, kind):
    """Tied embeddings, experts that a file has one by one, scaled embeddings, `Conv1D`."""
    found = reference(family, quant, memory)

    assert found.kind == kind
    with torch.no_grad():
        expected = plain(tmp_path, 4 if quant == "int4" else 16)(IDS).logits
    assert torch.equal(logits(found), expected)


def test_a_configuration_that_is_read_wrongly_has_no_part_in_the_reference(reference, tmp_path):
    """The engine's mistake would be the reference's too."""

    def change(config):
        config.rms_norm_eps = 1.0

    whole, repeating = (reference("llama", memory=memory, change=change) for memory in (1 << 40, 0))

    with torch.no_grad():
        expected = plain(tmp_path, 16)(IDS).logits
    assert torch.equal(logits(whole), expected)
    assert rel_error(logits(repeating), expected) > 0.05


def test_a_closed_reference_holds_no_weights(reference):
    found = reference("llama")
    logits(found)
    model = weakref.ref(found._model)

    found.close()

    assert model() is None


def test_rel_error_is_that_of_the_worst_token():
    expected = torch.ones(1, 3, 4)
    actual = expected.clone()
    actual[0, 1] *= 1.5

    assert rel_error(expected, expected) == 0
    assert rel_error(actual, expected) == pytest.approx(0.5)


def test_a_logit_within_the_tolerance_ties():
    logits = torch.tensor([[[1.0, 0.995, 0.5], [1.0, 0.9, 2.0]]])

    assert greedy_fraction(torch.tensor([[0, 2]]), logits, 0.01) == 1
    assert greedy_fraction(torch.tensor([[1, 2]]), logits, 0.01) == 1
    assert greedy_fraction(torch.tensor([[1, 2]]), logits, 0.001) == 0.5
    assert greedy_fraction(torch.tensor([[2, 0]]), logits, 0.01) == 0
