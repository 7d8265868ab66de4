"""What a run generated: hashes to compare runs by, and the first sequence in full."""

import hashlib
from dataclasses import dataclass
from typing import Any

from zi_experiments.cost_model.plan import Plan
from zi_experiments.measurement.text import tokenizer
from zi_experiments.quoting import printable
from zi_experiments.runtime import distributed


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """Tokens of the last pass. A hash is the SHA-256 of ids as little-endian int64, all ranks' sequences in order."""

    prompt_sha256: str
    prompt_tokens: int  # of all sequences
    tokens_sha256: str  # of the G generated tokens of each sequence, without its prompt
    first_tokens: list[int]
    first_text: str | None  # None: no tokenizer with the weights
    # False is no error: on a GPU some kernels add in no fixed order, which may decide a tie in another way.
    passes_equal: bool


def describe(plan: Plan, prompts: Any, passes: list[Any]) -> Generated:
    """Return what all ranks generated. Every rank calls this with its prompts and the tokens of each of its passes.

    Both are int64 of shape (sequences of this rank, length).
    """
    mine = _bytes(prompts), _bytes(passes[-1]), all(one.equal(passes[-1]) for one in passes), prompts.numel()
    all_prompts, all_tokens, equal, counts = zip(*distributed.from_all_ranks(mine), strict=True)
    first = passes[-1][0].tolist()
    return Generated(
        prompt_sha256=hashlib.sha256(b"".join(all_prompts)).hexdigest(),
        prompt_tokens=sum(counts),
        tokens_sha256=hashlib.sha256(b"".join(all_tokens)).hexdigest(),
        first_tokens=first,
        first_text=_text(plan, first) if distributed.rank() == 0 else None,
        passes_equal=all(equal),
    )


def _bytes(ids: Any) -> bytes:
    encoded: bytes = ids.cpu().numpy().astype("<i8").tobytes()
    return encoded


def _text(plan: Plan, ids: list[int]) -> str | None:
    """Return tokens as text on one line, or None: there is no tokenizer, or it belongs to another model."""
    if plan.run.weights.path is None:
        return None
    try:
        if (found := tokenizer(plan)) is None:
            return None
        text = found.decode(ids)
    except Exception:  # a checkpoint's tokenizer can raise any error, and no figure depends on it
        return None
    return printable(" ".join(text.split()))
