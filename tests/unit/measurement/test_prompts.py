"""Random prompts, and those of a text with a tokenizer that has a token for each word."""

import hashlib
import re

import pytest
import tiny
import torch
from cli import Cli
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from zi_experiments.config.schema import ConfigError
from zi_experiments.execution import preflight
from zi_experiments.measurement import prompts as measured
from zi_experiments.measurement.prompts import prompts
from zi_experiments.models import description
from zi_experiments.planner import planning

WORDS = 128
BEGIN = 7


def batch(**changes):
    return prompts(**({"batch_size": 12, "prompt_len": 64, "vocab_size": 1000, "seed": 0} | changes))


def test_shape_and_type():
    ids = batch()

    assert ids.shape == (12, 64)
    assert ids.dtype == torch.int64


def test_a_seed_is_a_batch():
    assert torch.equal(batch(seed=3), batch(seed=3))
    assert not torch.equal(batch(seed=3), batch(seed=4))


def test_the_global_generator_has_no_part_in_it():
    torch.manual_seed(1)
    first, state = batch(), torch.get_rng_state()
    torch.manual_seed(2)

    assert torch.equal(first, batch())
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_ids_are_in_the_vocabulary_and_never_special():
    ids = batch(batch_size=100, vocab_size=50)

    assert ids.min() == 4
    assert ids.max() == 49


def test_sequences_differ():
    assert len({tuple(sequence.tolist()) for sequence in batch()}) == 12


def test_a_vocabulary_too_small_for_special_ids():
    ids = batch(batch_size=100, vocab_size=8)

    assert ids.min() == 0
    assert ids.max() == 7


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 12])
def test_the_ranks_together_hold_the_same_sequences(ranks):
    shares = [batch(rank=rank, ranks=ranks) for rank in range(ranks)]

    assert {len(share) for share in shares} == {12 // ranks}
    assert torch.equal(torch.cat(shares), batch())


# --- of a text ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """`folder(begins=False)` → a checkpoint with a tokenizer for w0, w1, …, which begins sequences with w7 if told."""

    def folder(*, begins=False):
        model, saved = tiny.model("llama"), tmp_path / f"begins-{begins}"
        model.to(torch.bfloat16).save_pretrained(saved)
        tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(WORDS)}, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        if begins:
            tokenizer.post_processor = processors.TemplateProcessing(single="w7 $A", special_tokens=[("w7", BEGIN)])
        special = {"bos_token": "w7"} if begins else {}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(saved)
        return saved

    return folder


@pytest.fixture
def plan(compose_run, machine, tmp_path, folder):
    """`plan(words, *overrides)` → the plan of a run whose prompts are a text of these words; three prompts of four tokens."""

    def plan(words, *overrides, begins=False):
        (tmp_path / "my.txt").write_text(" ".join(f"w{word}" for word in words))
        given = [
            "model=local",
            f"model.path={folder(begins=begins)}",
            "weights=pretrained",
            "quant=fp16",
            "workload=smoke",
        ]
        given += [f"workload.prompts={tmp_path / 'my.txt'}", "workload.batch_size=3", "workload.prompt_len=4"]
        run = compose_run(*given, *overrides)
        return planning.build(run, description.load(run), machine("cpu"))

    return plan


def test_prompts_are_consecutive_parts_of_a_text(plan):
    found = measured.of_run(plan(range(20, 40)), 0, 1)

    assert found.tolist() == [[20, 21, 22, 23], [24, 25, 26, 27], [28, 29, 30, 31]]
    assert found.dtype == torch.int64


def test_each_prompt_begins_as_the_tokenizer_begins_a_sequence(plan):
    found = measured.of_run(plan(range(20, 29), begins=True), 0, 1)

    assert found.tolist() == [[BEGIN, 20, 21, 22], [BEGIN, 23, 24, 25], [BEGIN, 26, 27, 28]]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_text_has_prompts_for_all_ranks_and_micro_batches(plan, ranks):
    many = plan(range(20, 44), "engine=stream", "workload.micro_batches=2")

    shares = [measured.of_run(many, rank, ranks) for rank in range(ranks)]

    assert torch.cat(shares).flatten().tolist() == list(range(20, 44))
    assert {len(share) for share in shares} == {6 // ranks}


@pytest.mark.parametrize(
    ("words", "overrides", "begins", "expected"),
    [
        (11, [], False, "11 tokens and 3 prompts of 4 take 12: pass a longer text, or {batch}=2, or {length}=3"),
        (8, [], True, "8 tokens and 3 prompts of 3 take 9: pass a longer text, or {batch}=2, or {length}=3"),
        (3, [], False, "3 tokens and 3 prompts of 4 take 12: pass a longer text"),
        (23, ["workload.batch_size=4", "engine=stream", "workload.micro_batches=2"], False,
         "23 tokens and 8 prompts of 4 take 32: pass a longer text, or {batch}=2, or {length}=2"),
    ],
)  # fmt: skip
def test_a_text_too_short_is_refused_with_what_it_has(plan, tmp_path, words, overrides, begins, expected):
    expected = expected.format(batch="workload.batch_size", length="workload.prompt_len")

    with pytest.raises(ConfigError) as refused:
        preflight.check(plan(range(20, 20 + words), *overrides, begins=begins), [])

    assert str(refused.value) == f"workload.prompts={tmp_path / 'my.txt'} has {expected}"
    for advice in re.findall(r"workload\.(?:batch_size|prompt_len)=\d+", expected):
        preflight.check(plan(range(20, 20 + words), *overrides, advice, begins=begins), [])


def test_a_checkpoint_without_a_tokenizer_has_no_prompts(plan, tmp_path):
    given = plan(range(40))
    for file in (tmp_path / "begins-False").glob("tokenizer*"):
        file.unlink()

    with pytest.raises(ConfigError, match=r"needs the model's tokenizer and .* pass workload.prompts=null$"):
        preflight.check(given, [])


def test_a_run_is_measured_with_the_prompts_of_a_text(tmp_path, folder):
    cli = Cli(tmp_path)
    (tmp_path / "my.txt").write_text(" ".join(f"w{word}" for word in range(20, 60)))

    shape = ["workload=smoke", "quant=fp16", "engine=stream", "workload.micro_batches=2", "workload.prompts=my.txt"]
    done = cli.run("model=local", f"model.path={folder()}", "weights=pretrained", *shape, "tracking=none")

    assert done.returncode == 0, done.stdout + done.stderr
    [result] = cli.results()
    ids = torch.arange(20, 52)  # two micro-batches of two sequences, eight tokens each
    assert result["generated"]["prompt_tokens"] == len(ids)
    assert result["generated"]["prompt_sha256"] == hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
