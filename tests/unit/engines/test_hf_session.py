"""What the sessions of all engines do to a model."""

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from zi_experiments.engines.hf_session import HFSession


class Products(TorchDispatchMode):
    """The matrix products that are computed, by name and columns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.seen.append((func.overloadpacket.__name__, out.shape[-1]))
        return out


def test_the_head_is_one_product_for_the_whole_batch():
    """And not one for each sequence, with a copy of the head for each: the last tokens of prompts are not in one piece."""
    session = HFSession(tiny.model("opt").requires_grad_(False), "cpu")

    with torch.no_grad(), Products() as products:
        logits = session.model(tiny.prompts(3, 5), logits_to_keep=1).logits

    assert [name for name, columns in products.seen if columns == logits.shape[-1]] == ["mm"]


ASKED = [
    {"use_cache": False},
    {"num_beams": 4, "early_stopping": True},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(100))},
    {"forced_eos_token_id": 5, "forced_bos_token_id": 6},
    {"eos_token_id": list(range(128)), "pad_token_id": 0},
    {"max_length": 3, "min_length": 2, "max_time": 1e-9},
    {"return_dict_in_generate": True, "output_scores": True},
    {"num_return_sequences": 2, "do_sample": True},
    {"cache_implementation": "static", "prompt_lookup_num_tokens": 3},
]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: next(iter(asked)))
def test_tokens_are_those_of_the_largest_logits_whatever_a_checkpoint_asks_for(asked):
    model, ids, gen_len = tiny.model("llama"), tiny.prompts(2, 5), 4
    model.generation_config = own = GenerationConfig(**asked)
    widths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )

    tokens = HFSession(model, "cpu").generate(ids, gen_len)

    assert widths == [5, 1, 1, 1]  # keys and values are kept
    assert tokens.equal(greedy(model, ids, gen_len))
    assert model.generation_config is own


def greedy(model, ids, gen_len):
    with torch.no_grad():
        for _ in range(gen_len):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def test_decoding_does_not_copy_the_weights_of_routed_experts(monkeypatch):
    """As transformers has it on a GPU: 29 GB for 32 sequences of Mixtral, and two thirds of the tokens per second."""
    model = tiny.model("mixtral")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))

    def while_decoding():
        with model._optimize_model_for_decode():
            return model.config._experts_implementation

    copying = while_decoding()
    HFSession(model, "cpu")

    assert (copying, while_decoding()) == ("batched_mm", "grouped_mm")
