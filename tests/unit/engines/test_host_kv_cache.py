"""Whatever the cache keeps in host memory, a model computes with it what it computes with transformers' own."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from zi_experiments.engines import host_kv_cache
from zi_experiments.engines.host_kv_cache import HostCache

# as they differ to a cache: all heads, some, one, latents; windows on all layers, on some; layers of two shapes;
# layers that read what another layer was given; sparse and linear attention beside plain one
FAMILIES = [
    "opt",
    "llama",
    "falcon",
    "deepseek_v3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "gemma4_text",
    "glm_moe_dsa",
    "qwen3_next",
]


def assert_equal_to_the_default(model, cache, *passes):
    for number, (batch, length, steps) in enumerate(passes):
        ids = tiny.prompts(batch, length, seed=number)
        tokens, logits = tiny.generate(model, ids, steps)
        cache.reset()
        cached_tokens, cached_logits = tiny.generate(model, ids, steps, cache)
        assert torch.equal(cached_tokens, tokens)
        assert torch.equal(cached_logits, logits)


def in_host_memory(cache):
    return [layer for layer in cache.layers if type(layer).__module__ == HostCache.__module__]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logits_equal_those_of_the_default_cache(family):
    model = tiny.model(family)
    cache = HostCache(model.config, "cpu", sequences=3, capacity=40)

    # longer than two windows in decoding, then in the prompt; other batches; then as at first
    assert_equal_to_the_default(model, cache, (3, 5, 30), (2, 25, 15), (3, 1, 2), (1, 30, 10), (3, 5, 30))

    assert in_host_memory(cache) or family == "glm_moe_dsa"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma4_text"])
def test_it_grows_when_a_pass_needs_more(family):
    model = tiny.model(family)

    cache = HostCache(model.config, "cpu", sequences=1, capacity=4)
    assert_equal_to_the_default(model, cache, (1, 3, 20), (2, 30, 10), (1, 3, 3))


def test_memory_is_allocated_once():
    model = tiny.model("gemma2")
    cache = HostCache(model.config, "cpu", sequences=2, capacity=40)
    tiny.generate(model, tiny.prompts(2, 5), 30, cache)
    before = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]

    for batch, length in ((2, 10), (1, 38), (2, 3)):
        cache.reset()
        tiny.generate(model, tiny.prompts(batch, length), 40 - length, cache)

    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == before


def test_one_layer_alone():
    config = tiny.config("llama")
    config.num_hidden_layers = 1
    model = AutoModelForCausalLM.from_config(config).eval()

    assert_equal_to_the_default(model, HostCache(config, "cpu", 2, 40), (2, 5, 30), (1, 10, 10))


class LateStream:
    """A side stream that copies nothing before somebody waits for it."""

    device = "cpu"

    def __init__(self):
        self.copies = []
        self.current = False

    @contextmanager
    def as_current(self, _):
        self.current = True
        yield
        self.current = False

    def wait_stream(self, compute):
        """What computes here does so at once."""

    def record_event(self):
        return self  # all copies so far

    def synchronize(self):
        for copy in self.copies:
            copy()
        self.copies.clear()


class Compute:
    def wait_stream(self, side):
        side.synchronize()


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3", "gemma4_text"])
@pytest.mark.parametrize("capacity", [40, 4])
def test_compute_waits_for_copies_that_come_late(monkeypatch, family, capacity):
    model = tiny.model(family)
    cache = HostCache(model.config, "cpu", sequences=2, capacity=capacity)
    side, copy_at_once = LateStream(), torch.Tensor.copy_

    def copy(target, source, non_blocking=False):
        if side.current:
            assert non_blocking
            side.copies.append(lambda: copy_at_once(target, source))
        else:
            copy_at_once(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(torch.cuda, "stream", side.as_current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Compute())
    monkeypatch.setattr(
        host_kv_cache, "pinned_empty", lambda numel, dtype: torch.full((numel,), torch.nan, dtype=dtype)
    )
    for layer in in_host_memory(cache):
        layer._slots._side = side

    assert_equal_to_the_default(model, cache, (2, 5, 30), (1, 20, 10), (2, 5, 30))


def test_a_prompt_in_pieces():
    """Several tokens at once after others: the new ones need the window before each of them."""
    model = tiny.model("gpt_oss")
    ids = tiny.prompts(2, 40)
    caches = DynamicCache(config=model.config), HostCache(model.config, "cpu", 2, 40)

    for piece in ids.split(9, dim=1):
        with torch.no_grad():
            expected, logits = (model(piece, past_key_values=cache).logits for cache in caches)
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "deepseek_v3"])
def test_lengths_and_masks_are_those_of_the_default_cache(family):
    model = tiny.model(family)
    caches = DynamicCache(config=model.config), HostCache(model.config, "cpu", 2, 40)

    for length in (3, 1, 1, 3, 1, 12, 1):
        for cache in caches:
            with torch.no_grad():
                model(tiny.prompts(2, length), past_key_values=cache)
        theirs, ours = caches
        assert ours.get_seq_length() == theirs.get_seq_length()
        for index in range(len(theirs)):
            assert ours.get_mask_sizes(2, index) == theirs.get_mask_sizes(2, index)
            assert ours.is_sliding == theirs.is_sliding


@pytest.mark.parametrize("family", ["opt", "deepseek_v3"])
def test_a_step_writes_its_own_tokens_and_nothing_else(family):
    model = tiny.model(family)
    cache = HostCache(model.config, "cpu", sequences=2, capacity=40)
    with torch.no_grad():
        model(tiny.prompts(2, 7), past_key_values=cache)
        before = [buffer.clone() for layer in cache.layers for buffer in (layer.keys, layer.values)]
        for layer in cache.layers:
            for buffer in (layer.keys, layer.values):
                buffer.view(40, -1)[7:] = torch.nan
        model(tiny.prompts(2, 1), past_key_values=cache)

    after = [buffer for layer in cache.layers for buffer in (layer.keys, layer.values)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new.view(40, -1)[:7], old.view(40, -1)[:7])
        assert torch.isfinite(new.view(40, -1)[7]).all()
        assert torch.isnan(new.view(40, -1)[8:]).all()


def test_a_window_writes_its_own_tokens_until_there_is_no_room_behind_them():
    """Room for 16 tokens, a window of 8: seven are held, so the first seven and nine more are appended."""
    model = tiny.model("mistral")
    cache = HostCache(model.config, "cpu", sequences=2, capacity=100)
    buffer = None
    written = []
    with torch.no_grad():
        for length in [7] + [1] * 20:
            before = buffer.clone() if buffer is not None else None
            model(tiny.prompts(2, length), past_key_values=cache)
            buffer = cache.layers[0].keys.view(torch.int32).view(2 * tiny.WINDOW, -1)  # bits: NaN is not NaN
            if before is not None:
                written.append((buffer != before).any(1).nonzero().flatten().tolist())

    assert written[:9] == [[row] for row in range(7, 16)]
    assert written[9] == list(range(7))
    assert written[10:19] == [[row] for row in range(7, 16)]


def test_only_the_window_is_fetched():
    model = tiny.model("gemma2")
    cache = HostCache(model.config, "cpu", sequences=1, capacity=40)
    with torch.no_grad():
        model(tiny.prompts(1, 12), past_key_values=cache)
        for layer in cache.layers:
            if layer.is_sliding:
                layer.keys.view(2 * tiny.WINDOW, -1)[: 12 - (tiny.WINDOW - 1)] = torch.nan
        logits = model(tiny.prompts(1, 1), past_key_values=cache).logits

    assert torch.isfinite(logits).all()


# --- layers that the host computes -----------------------------------------------------------------------------------


class OnHost(HostCache):
    """Decode steps of some layers append on the host, as they do beside a GPU."""

    def __init__(self, config, which, **room):
        super().__init__(config, "cpu", on_host=which, **room)
        self.which = which

    def update(self, keys, values, layer_idx, *args, **kwargs):
        if layer_idx in self.which:
            self.layers[layer_idx].on_host = keys.shape[2] == 1
        return super().update(keys, values, layer_idx, *args, **kwargs)


@pytest.mark.parametrize(("family", "capacity"), [("llama", 4), ("gemma2", 40), ("gemma2", 4)])
def test_the_host_appends_to_what_the_gpu_has_stored(family, capacity):
    """With room, and without; in windows that slide."""
    model = tiny.model(family)
    count = model.config.num_hidden_layers

    for which in ({count - 1}, set(range(count))):
        cache = OnHost(model.config, which, sequences=2, capacity=capacity)
        assert_equal_to_the_default(model, cache, (2, 5, 30), (1, 20, 10), (2, 5, 30))


def test_the_host_waits_for_what_the_gpu_has_stored(monkeypatch):
    cache = HostCache(tiny.model("llama").config, "cpu", sequences=1, capacity=8, on_host={0})
    layer, events = cache.layers[0], []
    monkeypatch.setattr(layer._slots, "launched", lambda: SimpleNamespace(synchronize=lambda: events.append("waited")))
    prompt, token = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 1, 4)
    layer.update(prompt, prompt)
    layer.on_host = True

    for _ in range(2):
        keys, _ = layer.update(token, token)

    assert events == ["waited"]  # once: later tokens are the host's own
    assert torch.equal(keys, torch.cat([prompt, token, token], 2))


def test_nothing_is_fetched_for_layers_that_the_host_computes():
    layers = HostCache(tiny.model("llama").config, "cpu", sequences=1, capacity=8, on_host={1}).layers
    others = [layer for index, layer in enumerate(layers) if index != 1]

    assert layers[1].following is layers[1]
    assert all(layer.following in others for layer in others)
