"""What a run generated: hashes by which two runs are compared, and the first sequence in full."""

import hashlib
from dataclasses import dataclass
from typing import Any

from zi_experiments.cost_model.plan import Plan
from zi_experiments.measurement import perplexity
from zi_experiments.models.architecture import printable
from zi_experiments.runtime import distributed


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """The last pass. A hash is the SHA-256 of ids as little-endian int64, sequence after sequence, over all ranks."""

    prompt_sha256: str
    tokens_sha256: str  # of the G generated tokens of each sequence, without its prompt
    first_tokens: list[int]
    first_text: str | None  # None: no tokenizer beside the weights
    # On a GPU some kernels add in no fixed order, and a tie may then fall otherwise, so this is no error.
    passes_equal: bool


def describe(plan: Plan, prompts: Any, passes: list[Any]) -> Generated:
    """What all ranks generated; each calls it with its prompts, and with the tokens of each of its passes.

    These are int64 of shape (sequences of this rank, length).
    """
    mine = _bytes(prompts), _bytes(passes[-1]), all(one.equal(passes[-1]) for one in passes)
    all_prompts, all_tokens, equal = zip(*distributed.from_all_ranks(mine), strict=True)
    first = passes[-1][0].tolist()
    return Generated(
        prompt_sha256=hashlib.sha256(b"".join(all_prompts)).hexdigest(),
        tokens_sha256=hashlib.sha256(b"".join(all_tokens)).hexdigest(),
        first_tokens=first,
        first_text=_text(plan, first) if distributed.rank() == 0 else None,
        passes_equal=all(equal),
    )


def _bytes(ids: Any) -> bytes:
    encoded: bytes = ids.cpu().numpy().astype("<i8").tobytes()
    return encoded


def _text(plan: Plan, ids: list[int]) -> str | None:
    """Tokens as text on one line, or None: there is no tokenizer, or one of another model."""
    if plan.run.weights.path is None:
        return None
    try:
        text = perplexity.tokenizer(plan).decode(ids)
    except Exception:  # a checkpoint's tokenizer can raise any, and no figure depends on it
        return None
    return printable(" ".join(text.split()))
