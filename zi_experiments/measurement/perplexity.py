"""Perplexity of the loaded weights on a text: it shows what quantization costs."""

from math import exp, isfinite
from typing import Any

from zi_experiments.config.schema import ConfigError
from zi_experiments.cost_model.plan import Plan
from zi_experiments.measurement import text
from zi_experiments.runtime.progress import Progress


def windows(plan: Plan) -> Any:
    """Return the tokens of `workload.text` in windows: int64 of shape (windows, prompt_len). The rest is dropped.

    Raises `ConfigError` as `text.tokens` does, and when the text is shorter than a window.
    """
    length = plan.run.workload.prompt_len
    found = text.tokens(plan, "text")
    most = len(found.ids) + len(found.begin)
    if most < length:
        raise ConfigError(
            f"{found.setting} has {len(found.ids)} tokens and a window takes {length - len(found.begin)}: "
            "pass a longer text" + (f", or workload.prompt_len={most}" if most > 1 else "")
        )
    return found.windows(length)


def perplexity(model: Any, windows: Any, batch_size: int, progress: Progress) -> float:
    """Return exp of the mean negative log likelihood of each window's tokens but the first, given those before it.

    `windows` is int64 of shape (windows, length), on the model's device; `batch_size` of them go through the model at a
    time. The 16-bit logits are normalised in 32 bits, one window at a time, since logits over the vocabulary for each
    token are large. Every rank calls this with all windows, since each holds a part of the weights.
    Raises `ValueError` when the logits are not finite.
    """
    import torch
    from torch.nn.functional import cross_entropy

    progress.begin("perplexity", len(windows), "windows")
    total = 0.0
    with torch.inference_mode():
        for batch in windows.split(batch_size):
            logits = model(batch, attention_mask=torch.ones_like(batch), use_cache=False).logits
            for window, scores in zip(batch, logits, strict=True):
                losses = cross_entropy(scores[:-1].float(), window[1:], reduction="none")
                total += float(losses.double().sum())
            progress.advance(len(batch))
    progress.end()
    mean = total / windows[:, 1:].numel()
    if not isfinite(mean):
        raise ValueError("the model's logits are not finite, so the text has no perplexity")
    return exp(mean)
