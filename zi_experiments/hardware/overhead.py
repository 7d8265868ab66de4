"""What plain transformers take for a token besides arithmetic, from two models that have next to none."""

from statistics import median
from typing import Any

import torch

from zi_experiments.engines.session import HFSession
from zi_experiments.measure import measure_pass
from zi_experiments.progress import silent

LAYERS = (4, 12)
PROMPT_LEN, GEN_LEN, PASSES = 8, 24, 3
SHAPE = {
    "hidden_size": 64,
    "ffn_dim": 256,
    "word_embed_proj_dim": 64,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}


def layer_and_step_s(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Seconds of a decoder layer, and of a step besides its layers: a decode step of `n` layers takes step + n · layer.

    On a busy machine either may come out as nothing, or less.
    """
    sessions = [HFSession(_model(layers, dtype).to(device), device) for layers in LAYERS]
    ids = torch.full((1, PROMPT_LEN), 5)
    steps: list[list[float]] = [[] for _ in sessions]
    for warm in (False, *[True] * PASSES):
        # in turns, so that a machine that becomes slower does so for both
        for session, found in zip(sessions, steps, strict=True):
            times = measure_pass(session, ids, GEN_LEN, silent()).step_s
            found.extend(times if warm else [])
    few, many = map(median, steps)
    layer_s = (many - few) / (LAYERS[1] - LAYERS[0])
    return layer_s, few - LAYERS[0] * layer_s


def _model(layers: int, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("opt", num_hidden_layers=layers, **SHAPE)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
