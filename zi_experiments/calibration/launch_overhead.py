"""Measure the launch overhead of plain transformers per token, with two models that have almost no arithmetic."""

from statistics import mean, median
from typing import Any

import torch

from zi_experiments.engines.hf_session import HFSession
from zi_experiments.measurement.timing import measure_pass
from zi_experiments.runtime.progress import silent

LAYERS = (4, 12)
PROMPT_LEN, GEN_LEN, PASSES = 8, 24, 2
SHAPE = {
    "hidden_size": 64,
    "ffn_dim": 256,
    "word_embed_proj_dim": 64,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}


class Overhead:
    """Launch overhead: with almost no arithmetic, a decode step of plain transformers takes step_s + layers · layer_s."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self._sessions = [HFSession(_model(layers, dtype).to(device), device) for layers in LAYERS]
        self._ids = torch.full((1, PROMPT_LEN), 5)
        self._found: list[tuple[float, float]] = []
        self._steps_s()  # the first ones are slower

    def sample(self) -> None:
        """Take one sample, for a fraction of a second; the CPU may be much faster a second later, so take several."""
        few, many = self._steps_s()
        layer_s = (many - few) / (LAYERS[1] - LAYERS[0])
        self._found.append((layer_s, few - LAYERS[0] * layer_s))

    def layer_and_step_s(self) -> tuple[float, float]:
        """Return the means of the samples, in seconds. On a busy machine either may be zero or negative."""
        layer_s, step_s = map(mean, zip(*self._found, strict=True))
        return layer_s, step_s

    def _steps_s(self) -> list[float]:
        steps: list[list[float]] = [[] for _ in self._sessions]
        for _ in range(PASSES):
            # alternate, so that a machine that becomes slower does so for both
            for session, found in zip(self._sessions, steps, strict=True):
                found.extend(measure_pass(session, self._ids, GEN_LEN, silent()).step_s)
        return [median(found) for found in steps]


def _model(layers: int, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("opt", num_hidden_layers=layers, **SHAPE)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
