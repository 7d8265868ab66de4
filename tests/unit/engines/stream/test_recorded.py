"""A step that is the same for every token, with the whole room of the KV cache, computes what a usual one does.

Here without a GPU: the step's operations run one by one, where CUDA replays them.
"""

import gc

import pytest
import tiny
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zi_experiments.engines.stream.device_kv_cache import DeviceCache
from zi_experiments.engines.stream.recorded import RecordedSteps, can_record

STEPS = 6


class OneByOne:
    """In place of graphs."""

    recorded = 0

    def __init__(self, device):
        pass

    def record(self, forward):
        type(self).recorded += 1
        self._forward, self._logits = forward, forward()
        return self._logits

    def run(self):
        self._logits.copy_(self._forward())

    def cut(self, between):
        between()


def generate(model, ids, cache):
    return tiny.generate(model, ids, STEPS, cache)


@pytest.mark.parametrize("family", ["opt", "llama", "qwen3", "gpt_neox", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_recorded_steps_give_the_tokens_of_usual_ones(family):
    model = tiny.model(family)
    cache = DeviceCache(model.config, 20, 3)
    assert can_record(model, cache)
    expected = [generate(model, tiny.prompts(3, 9, seed), None) for seed in range(2)]
    RecordedSteps(model, cache, [], OneByOne)
    before = OneByOne.recorded
    for (tokens, logits), seed in zip(expected, range(2), strict=True):
        cache.reset()
        found = generate(model, tiny.prompts(3, 9, seed), cache)
        assert torch.equal(found[0], tokens)
        torch.testing.assert_close(found[1], logits, rtol=1e-4, atol=1e-5)
        assert cache.get_seq_length() == 9 + STEPS - 1
    assert OneByOne.recorded == before + 1, "once for all passes"


class Reading(TorchDispatchMode):
    """Collects the storages that operations read, without keeping them, except those that they have made."""

    def __init__(self):
        super().__init__()
        self.read, self._made = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        made = {tensor.untyped_storage()._cdata for tensor in self._made}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in made:
                self.read.append(StorageWeakRef(tensor.untyped_storage()))
        self._made += [tensor for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]
        return out


class Forgetting(OneByOne):
    """As CUDA's graphs: what they read is an address."""

    def record(self, forward):
        self.reading = Reading()
        with self.reading:
            logits = forward()
        self.reading._made.clear()
        return logits

    def run(self):
        gc.collect()
        type(self).lost = sum(storage.expired() for storage in self.reading.read)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_what_a_recorded_step_reads_is_not_freed(family):
    model = tiny.model(family)
    cache = DeviceCache(model.config, 20, 3)
    RecordedSteps(model, cache, [], Forgetting)
    with torch.no_grad():
        generate(model, tiny.prompts(3, 9), cache)
    assert Forgetting.lost == 0


class Refusing(OneByOne):
    def record(self, forward):
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_model_whose_steps_cannot_be_recorded_computes_as_usual(caplog):
    model = tiny.model("llama")
    cache = DeviceCache(model.config, 20, 3)
    expected = generate(model, tiny.prompts(3, 9), None)[0]
    RecordedSteps(model, cache, [], Refusing)
    for _ in range(2):
        cache.reset()
        assert torch.equal(generate(model, tiny.prompts(3, 9), cache)[0], expected)
    assert caplog.text.count("decode steps are not recorded: operation not permitted") == 1


def test_other_sequences_are_another_step():
    model = tiny.model("llama")
    cache = DeviceCache(model.config, 20, 3)
    expected = {batch: generate(model, tiny.prompts(batch, 9), None)[0] for batch in (3, 1)}
    RecordedSteps(model, cache, [], OneByOne)
    for batch in (3, 1, 3):
        cache.reset()
        assert torch.equal(generate(model, tiny.prompts(batch, 9), cache)[0], expected[batch])


WINDOWS = ["gemma2", "gemma3_text", "mistral", "gpt_oss"]


@pytest.mark.parametrize("prompt_len", [tiny.WINDOW - 4, tiny.WINDOW - 1, tiny.WINDOW, 2 * tiny.WINDOW + 1])
@pytest.mark.parametrize("family", WINDOWS)
def test_windows_slide_in_recorded_steps(family, prompt_len):
    model = tiny.model(family)
    expected = tiny.generate(model, tiny.prompts(3, prompt_len), 2 * STEPS, None)
    cache = DeviceCache(model.config, prompt_len + 2 * STEPS, 3)
    assert can_record(model, cache)
    usual = tiny.generate(model, tiny.prompts(3, prompt_len), 2 * STEPS, cache)
    assert torch.equal(usual[1], expected[1]), "windows slide as transformers' do"
    before = OneByOne.recorded
    RecordedSteps(model, cache, [], OneByOne)
    for _ in range(2):
        cache.reset()
        found = tiny.generate(model, tiny.prompts(3, prompt_len), 2 * STEPS, cache)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    assert OneByOne.recorded == before + 1


@pytest.mark.parametrize("family", ["gemma4_text", "llama4_text"])
def test_layers_without_states_of_their_own_and_chunks_are_computed_as_usual(family):
    model = tiny.model(family)
    expected = generate(model, tiny.prompts(3, 9), None)
    cache = DeviceCache(model.config, 20, 3)
    before = OneByOne.recorded
    if can_record(model, cache):
        RecordedSteps(model, cache, [], OneByOne)
    found = generate(model, tiny.prompts(3, 9), cache)
    assert torch.equal(found[0], expected[0])
    assert OneByOne.recorded == before


def test_a_step_that_is_forgotten_is_recorded_anew():
    model = tiny.model("llama")
    cache = DeviceCache(model.config, 20, 3)
    expected = generate(model, tiny.prompts(3, 9), None)[0]
    recorded, before = RecordedSteps(model, cache, [], OneByOne), OneByOne.recorded
    for number in range(1, 3):
        cache.reset()
        assert torch.equal(generate(model, tiny.prompts(3, 9), cache)[0], expected)
        assert OneByOne.recorded == before + number
        recorded.forget()


def test_what_depends_on_the_length_is_not_recorded():
    model = tiny.model("llama")
    cache = DeviceCache(model.config, 20, 3)
    assert can_record(model, cache)
    assert not can_record(model, None)
    model.config.rope_parameters = model.config.rope_parameters | {"rope_type": "dynamic"}
    assert not can_record(model, cache)
    model.config.rope_parameters["rope_type"] = "default"
    model.config.rope_parameters["sliding_attention"] = {"rope_type": "longrope"}
    assert not can_record(model, cache)
    model.config.rope_parameters["sliding_attention"]["rope_type"] = "yarn"
    model.config._attn_implementation = "flash_attention_2"
    assert not can_record(model, cache)
    assert isinstance(model, nn.Module)
