"""A whole batch at once or in blocks, with room for its tokens or without: a model computes the same."""

import pytest
import tiny
import torch
from transformers import DynamicCache

from zi_experiments.engines.stream.device_kv_cache import DeviceCache
from zi_experiments.engines.stream.micro_batches import BlockCache, in_blocks
from zi_experiments.models.structure import decoder_layers

# as they differ to a layer: a mask, alibi as a tensor of (batch · heads) rows, rotary tables as a tuple, windows, experts,
# latents, layers that read what another layer was given
FAMILIES = ["opt", "bloom", "llama", "gptj", "falcon", "gemma2", "gpt_oss", "mixtral", "deepseek_v3", "gemma4_text"]


def padded(ids):
    """A mask with other rows for each sequence: padding on the left."""
    mask = torch.ones_like(ids)
    for row in range(len(ids)):
        mask[row, : row % 3] = 0
    return mask


def put_blocks(model, blocks):
    """Every decoder layer computes in blocks; the list that is returned has the rows of each call of a layer."""
    rows = []
    for layer in decoder_layers(model)[1]:

        def forward(*args, forward=layer.forward, **kwargs):
            def counted(*args, **kwargs):
                rows.append((args[0] if args else kwargs["hidden_states"]).shape[0])
                return forward(*args, **kwargs)

            return in_blocks(counted, args, kwargs, blocks)

        layer.forward = forward
    return rows


def generate(model, ids, steps, cache):
    out = model.generate(
        ids,
        attention_mask=padded(ids),
        past_key_values=cache,
        min_new_tokens=steps,
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits)


def assert_close(found, expected):
    """Tokens are equal and logits but for the order of a few sums, which depends on the number of rows."""
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


# its layers hand keys and values on in a container that all blocks write to
SHARING = pytest.param("gemma4_text", marks=pytest.mark.xfail(strict=True, reason="blocks overwrite what layers share"))


@pytest.mark.parametrize("family", [*FAMILIES[:-1], SHARING])
def test_a_pass_in_blocks_is_that_of_the_whole_batch(family):
    model = tiny.model(family)
    ids = tiny.prompts(6, 11)
    expected = generate(model, ids, 12, None)
    rows = put_blocks(model, 3)
    cache = BlockCache([DeviceCache(model.config, 40, 4) for _ in range(3)])

    for _ in range(2):  # again after a reset
        cache.reset()
        assert_close(generate(model, ids, 12, cache), expected)
        assert cache.get_seq_length() == 22
    assert set(rows) == {2}


def test_each_block_has_the_keys_and_values_of_its_own_sequences():
    model = tiny.model("llama")
    ids, whole = tiny.prompts(4, 9), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=whole)
        put_blocks(model, 2)
        parts = [DynamicCache(config=model.config) for _ in range(2)]
        model(ids, past_key_values=BlockCache(parts))

    for index, layer in enumerate(whole.layers):
        torch.testing.assert_close(torch.cat([part.layers[index].keys for part in parts]), layer.keys)
        torch.testing.assert_close(torch.cat([part.layers[index].values for part in parts]), layer.values)
    assert parts[0].layers[0].keys.shape[0] == 2


def test_reset_empties_every_block():
    model = tiny.model("gemma2")
    parts = [DeviceCache(model.config, 40, 4) for _ in range(2)]
    cache = BlockCache(parts)
    put_blocks(model, 2)
    with torch.no_grad():
        model(tiny.prompts(4, 9), past_key_values=cache)
    assert cache.get_seq_length() == 9

    cache.reset()

    assert [part.get_seq_length() for part in (cache, *parts)] == [0, 0, 0]


@pytest.mark.parametrize(("batch", "blocks", "rows"), [(4, 3, 2), (5, 3, 5), (1, 4, 1), (6, 4, 2), (2, 8, 1)])
def test_a_batch_that_blocks_do_not_divide_has_fewer(batch, blocks, rows):
    """Verification brings four sequences, whatever the run's own are."""
    model = tiny.model("bloom")
    ids = tiny.prompts(batch, 7)
    expected = generate(model, ids, 5, None)
    seen = put_blocks(model, blocks)
    cache = BlockCache([DeviceCache(model.config, 20, 4) for _ in range(blocks)])

    assert_close(generate(model, ids, 5, cache), expected)
    assert set(seen) == {rows}


def test_a_cache_of_transformers_own_is_one_block():
    """Such as one of a user who calls the model: it cannot be divided."""
    model = tiny.model("llama")
    ids = tiny.prompts(4, 7)
    expected = generate(model, ids, 5, None)
    rows = put_blocks(model, 2)

    found = generate(model, ids, 5, DynamicCache(config=model.config))

    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert set(rows) == {4}


def test_without_a_cache_there_are_blocks():
    model = tiny.model("mixtral")
    ids = tiny.prompts(4, 7)
    with torch.no_grad():
        expected = model(ids, attention_mask=padded(ids), use_cache=False).logits
        rows = put_blocks(model, 2)
        found = model(ids, attention_mask=padded(ids), use_cache=False).logits

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert set(rows) == {2}


def test_what_a_layer_returns_beside_its_output_is_joined():
    """Tuples at any depth, row by row; what is no tensor is that of the first block."""

    def forward(hidden_states, extra, name):
        return hidden_states + extra["add"][0], (hidden_states.sum(-1), None), name

    hidden = torch.arange(24.0).view(4, 3, 2)
    extra = {"add": (torch.arange(4.0).view(4, 1, 1), torch.tensor([1.0, 2.0]))}

    whole = forward(hidden, extra, "a name")
    out, (sums, nothing), name = in_blocks(forward, (hidden,), {"extra": extra, "name": "a name"}, 2)

    assert torch.equal(out, whole[0])
    assert torch.equal(sums, whole[1][0])
    assert nothing is None
    assert name == "a name"


# --- DeviceCache ----------------------------------------------------------------------------------------------------


def assert_equal_to_the_default(model, cache, *passes):
    for number, (batch, length, steps) in enumerate(passes):
        ids = tiny.prompts(batch, length, seed=number)
        tokens, logits = generate(model, ids, steps, None)
        cache.reset()
        cached_tokens, cached_logits = generate(model, ids, steps, cache)
        assert torch.equal(cached_tokens, tokens)
        assert torch.equal(cached_logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logits_equal_those_of_the_default_cache(family):
    model = tiny.model(family)

    # other batches and lengths, more than there is room for, then as at first
    cache = DeviceCache(model.config, 24, 4)
    assert_equal_to_the_default(model, cache, (3, 5, 12), (2, 9, 10), (3, 20, 15), (1, 3, 3), (3, 5, 12))


def test_no_step_allocates_and_a_reset_keeps_the_room():
    model = tiny.model("llama")
    cache = DeviceCache(model.config, 24, 4)

    def addresses():
        return [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]

    with torch.no_grad():
        model(tiny.prompts(2, 5), past_key_values=cache)
        first = addresses()
        for _ in range(19):
            model(tiny.prompts(2, 1), past_key_values=cache)
            assert addresses() == first
        cache.reset()
        assert cache.get_seq_length() == 0
        model(tiny.prompts(2, 24), past_key_values=cache)
        assert addresses() == first
        model(tiny.prompts(2, 1), past_key_values=cache)
        assert addresses() != first, "25 tokens need more room than 24"
