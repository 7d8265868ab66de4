"""What a record says of the tokens that were generated, against plain transformers."""

import hashlib
import json

import torch
from cli import Cli
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zi_experiments.measurement import generated, prompts

VOCABULARY = 256
ODD = {
    "num_beams": 3,
    "do_sample": True,
    "repetition_penalty": 5.0,
    "use_cache": False,
    "eos_token_id": list(range(100)),
}


def save(folder):
    """A checkpoint that asks for other tokens than those of the largest logits, with a tokenizer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape)).to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(ODD))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_cache": False, "return_dict": False}))
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def sha256(ids):
    return hashlib.sha256(b"".join(int(one).to_bytes(8, "little", signed=True) for one in ids.flatten())).hexdigest()


def test_a_record_has_the_tokens_of_plain_transformers_with_both_engines(tmp_path):
    save(tmp_path / "model")
    cli = Cli(tmp_path)
    shape = {"batch_size": 2, "prompt_len": 8}

    done = cli.run(
        "-m",
        "model=local",
        f"model.path={tmp_path / 'model'}",
        "weights=pretrained",
        "engine=deepspeed,stream",
        "quant=fp16",
        "workload.batch_size=2",
        "workload.micro_batches=1",
        "workload.prompt_len=8",
        "workload.gen_len=6",
        "hardware.dtypes=[bfloat16]",
        "tracking=none",
    )

    assert done.returncode == 0, done.stdout + done.stderr
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16, return_dict=True).eval()
    seed = cli.results()[0]["config"]["workload"]["seed"]
    ids = asked = prompts.prompts(**shape, vocab_size=VOCABULARY, seed=seed)
    with torch.no_grad():
        for _ in range(6):
            logits = plain(ids, use_cache=False, return_dict=True).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    tokens = ids[:, 8:]
    for result in cli.results():
        assert result["generated"] == {
            "prompt_sha256": sha256(asked),
            "prompt_tokens": 16,
            "tokens_sha256": sha256(tokens),
            "first_tokens": tokens[0].tolist(),
            "first_text": " ".join(f"w{token}" for token in tokens[0].tolist()),
            "passes_equal": True,
        }
        assert f"the first sequence goes on: {result['generated']['first_text']}" in done.stdout


def test_ranks_are_joined_in_order_and_passes_compared(make_plan, machine, monkeypatch):
    plan = make_plan("model=opt-125m", on=machine("cpu"))
    ids = torch.arange(8).view(4, 2)
    passes = [torch.arange(12).view(4, 3), torch.arange(12).view(4, 3)]
    ranks = [slice(0, 2), slice(2, 4)]

    def described(passes):
        mine = [(generated._bytes(ids[one]), generated._bytes(passes[-1][one]), True, 4) for one in ranks]
        other = mine[1]
        monkeypatch.setattr(generated.distributed, "from_all_ranks", lambda value: [value, other])
        return generated.describe(plan, ids[ranks[0]], [one[ranks[0]] for one in passes])

    found = described(passes)

    assert found.prompt_tokens == 8
    assert (found.prompt_sha256, found.tokens_sha256) == (sha256(ids), sha256(passes[-1]))
    assert (found.first_tokens, found.first_text, found.passes_equal) == ([0, 1, 2], None, True)
    assert not described([passes[0] + 1, passes[1]]).passes_equal
