"""A checkpoint is held against its model by the headers of its files."""

import json
import os
import re
import struct
import subprocess
import sys
import time

import checkpoints
import pytest
import tiny
import torch
from checkpoints import HEAD
from families import save_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from zi_experiments.config.schema import ConfigError
from zi_experiments.models import contents
from zi_experiments.models.weights import PretrainedWeights

NORM = "model.norm.weight"


@pytest.fixture
def held(compose_run):
    """`held(folder)` → the architecture of a checkpoint."""
    return lambda folder: contents.load(compose_run(*pretrained(folder)))


def pretrained(folder):
    return "model=local", f"model.path={folder}", "weights=pretrained"


def refusal(held, folder):
    with pytest.raises(ConfigError) as refused:
        held(folder)
    message = str(refused.value)
    assert message.isprintable()
    assert ": pass weights.path=…" in message
    return message


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_a_family_saves_fits_it(held, tmp_path, family):
    tiny.model(family).to(torch.bfloat16).save_pretrained(tmp_path)

    found = held(tmp_path)

    assert found.ignored_tensors == ()
    assert found.num_parameters == sum(p.numel() for p in tiny.model(family).parameters())


@pytest.mark.parametrize("layout", ["sharded", "bin"])
def test_other_layouts_fit_too(held, tmp_path, layout):
    """A `.bin` file has a tied head beside its embedding: the same values."""
    save_checkpoint(tmp_path, "opt", torch.float32, layout=layout)

    assert "lm_head.weight" not in {p.name for p in held(tmp_path).parameters}


def test_another_head_in_a_bin_file_is_one_of_its_own(held, tmp_path):
    save_checkpoint(tmp_path, "opt", torch.float32, layout="bin")
    state = torch.load(tmp_path / "pytorch_model.bin")
    torch.save(state | {"lm_head.weight": state["lm_head.weight"].flip(0)}, tmp_path / "pytorch_model.bin")

    found = held(tmp_path)

    assert "lm_head.weight" in {p.name for p in found.parameters}
    assert found.config.tie_word_embeddings is False


@pytest.fixture
def split(tmp_path):
    """`split(change)` → a llama in two files with its last norm in both, whose tensors are as `change` makes them.

    Its index has the norm in the first.
    """

    def split(change):
        tiny.model("llama").save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").unlink()
        norm, second = tensors[NORM], {HEAD: tensors.pop(HEAD)}
        first, second = change(tensors, second | {NORM: norm})
        for name, part in (("one.safetensors", first), ("two.safetensors", second)):
            save_file(part, tmp_path / name, metadata={"format": "pt"})
        index = dict.fromkeys(tensors, "one.safetensors") | {NORM: "one.safetensors", HEAD: "two.safetensors"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        return tmp_path

    return split


def moved(first, second):
    first.pop(NORM)
    return first, second


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda first, second: (first, second | {NORM: second[NORM] * 2}),
            "names one.safetensors for model.norm.weight, but two.safetensors has another tensor of that name",
        ),
        (
            lambda first, second: (first, second | {NORM: second[NORM].half()}),
            "names one.safetensors for model.norm.weight, but two.safetensors has another tensor of that name",
        ),
        (moved, "names one.safetensors for model.norm.weight, but two.safetensors has it"),
    ],
)
def test_an_index_that_leads_to_another_tensor_than_plain_transformers_loads(held, split, change, said):
    """Engines that read files in place would compute something else, or not find it."""
    folder = split(change)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(plain.get_parameter(NORM), load_file(folder / "two.safetensors")[NORM].float())

    assert said in refusal(held, folder)


def test_a_tensor_that_is_there_twice_is_read_as_plain_transformers_does(held, split):
    folder = split(lambda first, second: (first, second))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    weights = PretrainedWeights(str(folder), held(folder).config, torch.bfloat16)
    for name, parameter in plain.named_parameters():
        read = torch.empty_like(parameter)
        weights.fill(name, read.data)
        assert torch.equal(read, parameter), name
    weights.close()


def test_what_transformers_leaves_out_on_purpose_is_told(held, tmp_path):
    """Layers that predict further tokens, and masks that older versions stored."""
    tiny.model("qwen3_next").to(torch.bfloat16).save_pretrained(tmp_path)
    more = {"mtp.fc.weight": torch.zeros(2, 2), "model.layers.0.attn.masked_bias": torch.zeros(())}
    checkpoints.rewrite(tmp_path, lambda tensors: tensors.update(more))

    assert set(held(tmp_path).ignored_tensors) == set(more)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({"model.layers.0.new.weight": torch.zeros(2)}), "leave out (model.layers.0.new.weight)"),
        (lambda t: t.pop("model.norm.weight"), "lacks tensors that its config.json asks for (model.norm.weight)"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
            "(model.norm.weight [3] where the model has [32])",
        ),
        (lambda t: t.update({"\x1b[2J\n": torch.zeros(2)}), r"leave out (\x1b[2J\n)"),
    ],
)
def test_what_does_not_fit(held, tmp_path, change, said):
    tiny.model("llama").save_pretrained(tmp_path)
    checkpoints.rewrite(tmp_path, change)

    assert said in refusal(held, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"compile_config": {"fullgraph": true}}', "must be an instance of `CompileConfig`"),
        ('{"suppress_tokens": [1], "forced_eos_token_id": 1}', "is also in `suppress_tokens`"),
    ],
)
def test_what_transformers_does_not_load_of_generation_is_refused(held, tmp_path, text, said):
    tiny.model("llama").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        AutoModelForCausalLM.from_pretrained(tmp_path)

    assert said in refusal(held, tmp_path)


@pytest.mark.parametrize("text", ["{bad", '{"do_sample": true, "num_beams": 4}'])
def test_what_transformers_loads_all_the_same_is_held(held, tmp_path, text):
    tiny.model("llama").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    AutoModelForCausalLM.from_pretrained(tmp_path)

    assert held(tmp_path).num_layers == 3


def test_a_large_checkpoint_is_held_at_once(held, tmp_path):
    """Of 100 GB only the header is there to be read."""
    config = tiny.config("llama")
    config.vocab_size, config.tie_word_embeddings = 1 << 30, True
    config.save_pretrained(tmp_path)
    model = tiny.model("llama")
    tensors, end = {}, 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        shape = [1 << 30, 32] if "embed" in name else list(tensor.shape)
        size = 2 * torch.Size(shape).numel()
        tensors[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(tensors).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    began = time.process_time()

    assert held(tmp_path).num_parameters > 1 << 35
    assert time.process_time() - began < 5


@pytest.mark.integration
def test_a_hub_name_is_held_as_far_as_the_cache_has_it(tmp_path):
    """Offline. Of its config.json alone nothing can be said before a worker looks for the weights, which is no error."""
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("0" * 40)
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    tiny.config("llama").save_pretrained(snapshot)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    settings = [*pretrained("some/model"), "tracking=none", "workload=smoke", "engine=stream", "quant=fp16"]

    def said(*more):
        command = [sys.executable, "-m", "zi_experiments", *settings, *more]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        assert "Traceback" not in done.stdout + done.stderr
        return " ".join(done.stdout.split())

    assert re.search(r"refused \S+: some/model cannot be downloaded from the hub \(.*\): pass weights.path=…", said())
    tiny.model("llama").save_pretrained(snapshot)
    checkpoints.rewrite(snapshot, lambda tensors: tensors.pop("model.norm.weight"))
    assert "refused some/model lacks tensors that its config.json asks for (model.norm" in said("plan_only=true")
