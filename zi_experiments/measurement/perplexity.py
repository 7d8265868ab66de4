"""Perplexity of the loaded weights on a text, and their divergence from 16 bits: what quantization costs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import exp, isfinite
from pathlib import Path
from stat import S_ISREG
from typing import Any

from zi_experiments.config.schema import ConfigError
from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines.base import Session
from zi_experiments.measurement import reference as references
from zi_experiments.models.architecture import is_refused_code, local_or_hub, refused_code
from zi_experiments.runtime.progress import Progress

Logits = Callable[[Any], Any]  # tokens (sequences, length) → logits (sequences, length, vocabulary)


def windows(plan: Plan) -> Any:
    """Return the tokens of `workload.text` in windows: int64 of shape (windows, prompt_len). The rest is dropped.

    Each window begins with the tokenizer's begin token, if it puts one first; there are no other special tokens.
    Raises `ConfigError` when the text cannot be read or is shorter than a window, and when the checkpoint has no
    tokenizer for its model.
    """
    import torch

    name, length = plan.run.workload.text, plan.run.workload.prompt_len
    assert name is not None
    encode = tokenizer(plan)
    begin = _beginning(encode)
    ids = encode(_read(name), add_special_tokens=False, verbose=False).input_ids
    taken = length - len(begin)
    if len(ids) < taken:
        most = len(ids) + len(begin)
        raise ConfigError(
            f"workload.text={name} has {len(ids)} tokens and a window takes {taken}: pass a longer text"
            + (f", or workload.prompt_len={most}" if most > 1 else "")
        )
    vocabulary = plan.architecture.config.get_text_config().vocab_size
    if max(ids) >= vocabulary:
        raise ConfigError(
            f"the tokenizer of {plan.run.weights.path} gives token {max(ids)} and the model knows {vocabulary}: "
            "pass weights.path=… with the tokenizer of this model"
        )
    count = len(ids) // taken
    cut = torch.tensor(ids[: count * taken]).view(count, taken)
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(count, -1), cut], 1)


def _beginning(tokenizer: Any) -> list[int]:
    """Return the token that the tokenizer puts first in every sequence, in a list; the list is empty without one."""
    first: list[int] = tokenizer("a").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def check_text(name: str | None) -> None:
    """Raise `ConfigError` when `workload.text` is not a file with UTF-8 text."""
    if name is not None:
        _read(name)


def _read(name: str) -> str:
    path = Path(name).expanduser()
    try:
        if not S_ISREG(path.stat().st_mode):
            raise ConfigError(f"workload.text={name} is not a file: pass a text file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"workload.text={name} cannot be read ({error.strerror}): pass a text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"workload.text={name} is not UTF-8: pass a text file in UTF-8") from error
    if not text.strip():
        raise ConfigError(f"workload.text={name} is empty: pass a text file")
    return text


def tokenizer(plan: Plan) -> Any:
    """Return the tokenizer of the run's checkpoint. Raises `ConfigError` when none can be loaded."""
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    path, trusted = plan.run.weights.path, plan.run.trust_remote_code
    assert path is not None
    source = local_or_hub(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted)
    except Exception as error:  # a broken file can raise any error
        if is_refused_code(error, trusted):
            raise ConfigError(refused_code(path, get_tokenizer_config(source)["auto_map"])) from error
        raise ConfigError(_no_tokenizer(path)) from error
    # without its files, transformers makes an empty tokenizer for some families
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ConfigError(_no_tokenizer(path))
    return tokenizer


def _no_tokenizer(path: str) -> str:
    return (
        f"workload.text needs the model's tokenizer and {path} has none that loads: save it there (tokenizer.json), or pass "
        "workload.text=null"
    )


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
