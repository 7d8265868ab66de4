"""Deterministic prompts."""

from typing import Any

FIRST_ID = 4  # smaller ids are padding, begin and end in the families that have these tokens


def prompts(*, batch_size: int, prompt_len: int, vocab_size: int, seed: int, rank: int = 0, ranks: int = 1) -> Any:
    """Return the prompts of one rank: random ids in [4, vocab_size), never padding.

    They are int64 of shape (batch_size / ranks, prompt_len). The whole batch depends on the seed alone, so that all
    numbers of ranks together hold the same sequences.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    low = FIRST_ID if vocab_size > 2 * FIRST_ID else 0
    batch = torch.randint(low, vocab_size, (batch_size, prompt_len), generator=generator)
    share = batch_size // ranks
    return batch[rank * share : (rank + 1) * share]
