"""Perplexity of the loaded weights on a text, and their divergence from 16 bits: what quantization costs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import exp, isfinite
from typing import Any

from zi_experiments.config.schema import ConfigError
from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines.base import Session
from zi_experiments.measurement import reference as references
from zi_experiments.measurement import text
from zi_experiments.runtime.progress import Progress

Logits = Callable[[Any], Any]  # tokens (sequences, length) → logits (sequences, length, vocabulary)


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


def perplexity(
    model: Any, windows: Any, batch_size: int, progress: Progress, sixteen_bit: Logits | None = None
) -> tuple[float, float | None]:
    """Return the perplexity of the windows, and the KL divergence of the model from `sixteen_bit`; None without it.

    Perplexity is exp of the mean negative log likelihood of each window's tokens but the first, given those before it.
    The divergence is the mean over the same tokens of Σ p·(ln p − ln q), in nats: p and q are the distributions of the
    token in 16 bits and as loaded.

    `windows` is int64 of shape (windows, length), on the model's device; `batch_size` of them go through the model at a
    time. The 16-bit logits are normalised in 32 bits, one window at a time, since logits over the vocabulary for each
    token are large. Every rank calls this with all windows, since each holds a part of the weights.
    Raises `ValueError` when the logits are not finite.
    """
    import torch
    from torch.nn.functional import kl_div, nll_loss

    progress.begin("perplexity", len(windows), "windows")
    loss = divergence = 0.0
    with torch.inference_mode():
        for batch in windows.split(batch_size):
            expected = [None] * len(batch) if sixteen_bit is None else sixteen_bit(batch)
            logits = model(batch, attention_mask=torch.ones_like(batch), use_cache=False).logits
            for window, scores, theirs in zip(batch, logits, expected, strict=True):
                found = scores[:-1].float().log_softmax(-1)
                loss += float(nll_loss(found, window[1:], reduction="none").double().sum())
                if theirs is not None:
                    target = theirs[:-1].to(found.device).float().log_softmax(-1)
                    divergence += float(kl_div(found, target, reduction="none", log_target=True).sum(-1).double().sum())
            progress.advance(len(batch))
    progress.end()
    tokens = windows[:, 1:].numel()
    if not isfinite(loss + divergence):
        raise ValueError("the model's logits are not finite, so the text has no perplexity")
    return exp(loss / tokens), None if sixteen_bit is None else divergence / tokens


@contextmanager
def sixteen_bit(plan: Plan, session: Session, device: Any, host_memory_bytes: int) -> Iterator[Logits]:
    """Yield a function that returns logits of the plan's checkpoint in plain transformers and 16 bits, in host memory.

    The checkpoint is loaded whole if it fits into so much host memory, else a layer at a time for each call.
    """
    quant = replace(plan.run.quant, bits=16, group_size=None, group_dim=None)
    plain = replace(plan, run=replace(plan.run, quant=quant))
    reference = references.of(plain, device, host_memory_bytes)

    def logits(tokens: Any) -> Any:
        with session.parked():
            return reference.run(tokens, lambda _, forward, args, kwargs: forward(*args, **kwargs)).cpu()

    try:
        yield logits
    finally:
        reference.close()
