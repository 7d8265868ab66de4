"""Perplexity: its definition, what is refused, and the sweep that shows what quantization costs a trained model."""

import json
import re
import shutil
from math import exp, log

import formats
import pytest
import torch
from cli import Cli
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zi_experiments.config import schema
from zi_experiments.config.schema import ConfigError
from zi_experiments.engines.hf_session import HFSession
from zi_experiments.execution import preflight
from zi_experiments.measurement import perplexity
from zi_experiments.models import description
from zi_experiments.planner import planning
from zi_experiments.runtime.progress import silent

TEXT = schema.PACKAGE / "data" / "moby-dick.txt"
VOCABULARY, WINDOW = 512, 128


def llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=256, tie_word_embeddings=False, **shape)
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small Llama that has read the shipped text for a few seconds, with a tokenizer made from it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train([str(TEXT)], trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    train(torch.tensor(tokenizer.encode(TEXT.read_text(encoding="utf-8")).ids)).save_pretrained(folder)
    return folder


def train(ids):
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    generator = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for one another at every step while other processes compute
    for _ in range(200):
        batch = ids[torch.randint(len(ids) - 32, (16, 1), generator=generator) + torch.arange(32)]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return model


@pytest.fixture
def plan(compose_run, machine, checkpoint):
    """`plan(*overrides)` → the plan of a run of the checkpoint on the shipped text."""

    def plan(*overrides):
        given = ["experiment=quality", "model=local", f"model.path={checkpoint}", f"workload.prompt_len={WINDOW}"]
        run = compose_run(*given, *overrides)
        return planning.build(run, description.load(run), machine("cpu"))

    return plan


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large():
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    windows = torch.arange(5 * 8).view(5, 8)

    assert perplexity.perplexity(model, windows, 2, silent())[0] == pytest.approx(VOCABULARY, rel=1e-6)


def test_a_model_that_knows_what_comes_next_is_not_perplexed():
    """Each token's embedding points at the next one; the first token of a window, which nothing precedes, is not counted."""
    model = llama()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.zero_()[:128].fill_diagonal_(1.0)
        model.lm_head.weight.zero_()[1:129].fill_diagonal_(10.0)
    windows = torch.arange(6 * 8).view(6, 8)

    assert perplexity.perplexity(model, windows, 4, silent())[0] == pytest.approx(1.0, abs=1e-6)
    assert perplexity.perplexity(model, windows.flip(1), 4, silent())[0] > 1e9


def test_perplexity_does_not_depend_on_how_many_windows_go_at_a_time(plan):
    windows = perplexity.windows(plan())[:7]
    one, three = (perplexity.perplexity(llama(), windows, size, silent())[0] for size in (1, 3))

    assert one == pytest.approx(three, rel=1e-5)


def test_the_divergence_from_another_model_is_that_of_its_definition():
    """Σ p·(ln p − ln q) of each token but the first of a window, from all logits at once and by torch's own function."""
    loaded, other = llama(), llama()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    windows = torch.randint(VOCABULARY, (5, 8))
    with torch.inference_mode():
        p, q = (model(windows).logits[:, :-1].reshape(-1, VOCABULARY).double().softmax(-1) for model in (other, loaded))
        reference = torch.nn.functional.kl_div(q.log(), p, reduction="batchmean")

        _, found = perplexity.perplexity(loaded, windows, 2, silent(), lambda batch: other(batch).logits)
        _, none = perplexity.perplexity(other, windows, 2, silent(), lambda batch: other(batch).logits)

    assert found == pytest.approx(float(reference), rel=1e-4)
    assert found == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert found > 0.001
    assert none == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("host_memory_bytes", [0, 10**12], ids=["a layer at a time", "whole"])
def test_the_model_in_16_bits_is_the_checkpoint_whatever_the_run_quantizes(plan, checkpoint, host_memory_bytes):
    quantized, device = plan("quant=int4"), torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    tokens = torch.arange(2 * WINDOW).view(2, WINDOW)

    with perplexity.sixteen_bit(quantized, HFSession(model, device), device, host_memory_bytes) as logits:
        found = logits(tokens)

    assert found.dtype is torch.bfloat16
    with torch.inference_mode():
        assert found.equal(model(tokens).logits)


def test_without_a_model_in_16_bits_there_is_no_divergence():
    assert perplexity.perplexity(llama(), torch.arange(16).view(2, 8), 2, silent())[1] is None


def test_windows_are_the_text_in_order_without_its_end(plan, checkpoint):
    windows = perplexity.windows(plan())

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = TEXT.read_text(encoding="utf-8")
    seen = tokenizer.decode(windows.flatten().tolist()).strip()
    assert text.startswith(seen)
    assert len(text) - len(seen) < 8 * WINDOW
    assert windows.shape[1] == WINDOW


def test_each_window_begins_as_the_tokenizer_begins_a_sequence(plan, tmp_path, checkpoint):
    """Every token of the text counts then, given the one that begins, and plain transformers agrees on the loss."""
    copy = tmp_path / "begins"
    shutil.copytree(checkpoint, copy)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    begin = tokenizer.convert_tokens_to_ids("Q")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="Q $A", special_tokens=[("Q", begin)]
    )
    tokenizer.bos_token = "Q"
    tokenizer.save_pretrained(copy)
    given = plan(f"model.path={copy}", f"weights.path={copy}")

    windows = perplexity.windows(given)

    without = perplexity.windows(plan()).flatten()
    assert windows.shape[1] == WINDOW
    assert (windows[:, 0] == begin).all()
    assert windows[:, 1:].flatten()[:1000].equal(without[:1000])
    model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.bfloat16).eval()
    text = AutoTokenizer.from_pretrained(copy)(TEXT.read_text(encoding="utf-8")).input_ids
    first = torch.tensor(text[:WINDOW])
    assert windows[0].equal(first)
    found, _ = perplexity.perplexity(model, windows[:1], 1, silent())
    with torch.inference_mode():
        assert found == pytest.approx(exp(model(first[None], labels=first[None]).loss), rel=1e-3)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, r"cannot be read \(No such file or directory\): pass a text file"),
        (b"\xff\xfe\xfa", "is not UTF-8: pass a text file in UTF-8"),
        (b"Call me Ishmael.", rf"has \d+ tokens and a window takes {WINDOW}: pass .*workload.prompt_len=\d+"),
        (b" \n", r"is empty: pass a text file$"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(plan, tmp_path, content, expected):
    text = tmp_path / "my.txt"
    if content is not None:
        text.write_bytes(content)

    with pytest.raises(ConfigError, match=rf"^workload.text={re.escape(str(text))} {expected}"):
        preflight.check(plan(f"workload.text={text}"), [])


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "gemma2"])
def test_a_checkpoint_without_a_tokenizer_is_refused(plan, tmp_path, family):
    """transformers makes OPT, Qwen and Gemma a tokenizer that knows no word."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))

    with pytest.raises(ConfigError, match=rf"{tmp_path} has none that loads.*pass workload.text=null"):
        preflight.check(plan(f"weights.path={tmp_path}"), [])


def test_a_tokenizer_of_another_model_is_refused(plan, tmp_path, checkpoint):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    shape = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(shape | {"vocab_size": 256}))

    with pytest.raises(ConfigError, match=r"gives token \d+ and the model knows 256: pass weights.path="):
        preflight.check(plan(f"model.path={tmp_path}"), [])


def swept(folder, checkpoint, quants):
    """What the experiment prints for a checkpoint, and its records by their quantization."""
    cli = Cli(folder)
    (folder / "my.txt").write_text(TEXT.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    done = cli.run(
        "experiment=quality",
        "model=local",
        f"model.path={checkpoint}",
        f"workload.prompt_len={WINDOW}",
        "workload.batch_size=16",
        "workload.text=my.txt",
        f"quant={quants}",
        "tracking=none",
        COLUMNS="200",  # one line of the table for each run
    )

    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, {result["choices"]["quant"]: result for result in cli.results()}


@pytest.mark.integration
def test_a_sweep_shows_what_quantization_costs(tmp_path, checkpoint, plan):
    shown, results = swept(tmp_path, checkpoint, "fp16,native,int8-g32,int4-g128")
    found = {quant: result["metrics"]["perplexity"] for quant, result in results.items()}
    windows = perplexity.windows(plan(f"workload.text={tmp_path / 'my.txt'}"))
    assert set(found) == {"fp16", "int8-g32", "int4-g128"}
    assert re.search(r"^skipped \S+: quant=native keeps weights as", shown, re.MULTILINE)
    assert found["fp16"] == pytest.approx(plain_perplexity(checkpoint, windows), rel=1e-4)
    assert found["fp16"] < VOCABULARY / 4
    assert abs(log(found["int8-g32"] / found["fp16"])) < 0.0005
    assert 0.001 < log(found["int4-g128"] / found["fp16"]) < 0.05
    apart = {quant: result["metrics"]["kl_divergence"] for quant, result in results.items()}
    assert 0 <= apart["fp16"] < apart["int8-g32"] < apart["int4-g128"] < 0.1
    table = shown[shown.index("What does quantization cost in quality?") :].partition("└")[0]
    assert "perplexity" in table
    assert "native" not in table
    for quant, value in found.items():
        assert re.search(rf"│ {quant} +│ +{value:.6g} │ +{value / found['fp16']:.2f} │ +{apart[quant]:.6g} │", table), (
            table
        )


@pytest.mark.integration
@pytest.mark.release
def test_a_sweep_shows_what_it_costs_to_quantize_a_checkpoint_again(tmp_path, checkpoint):
    """Its own codes cost nothing: they are the 16-bit model that plain transformers makes of them."""
    folder = tmp_path / "quantized"
    shutil.copytree(checkpoint, folder)
    formats.in_block_fp8(folder)
    shown, results = swept(tmp_path, folder, "fp16,native,int4")
    apart = {quant: result["metrics"]["kl_divergence"] for quant, result in results.items()}
    table = shown[shown.index("What does quantization cost in quality?") :]

    assert apart["native"] == apart["fp16"] == 0
    assert apart["int4"] > 0.001
    assert results["native"]["metrics"]["perplexity"] == results["fp16"]["metrics"]["perplexity"]
    assert re.search(r"│ native +│ +\S+ │ +1\.00 │ +0 │", table), table


def plain_perplexity(folder, windows):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        losses = [model(window[None], labels=window[None]).loss.double() for window in windows]
    return exp(torch.stack(losses).mean())
