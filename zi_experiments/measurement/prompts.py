"""Prompts: random ones from a seed, or those of a text."""

from typing import Any

from zi_experiments.config.schema import ConfigError
from zi_experiments.cost_model.plan import Plan
from zi_experiments.measurement import text

FIRST_ID = 4  # smaller ids are padding, begin and end in the families that have these tokens


def of_run(plan: Plan, rank: int, ranks: int) -> Any:
    """Return the prompts of one rank: those of `workload.prompts`, or random ones. Shape and type as of `prompts`."""
    work = plan.run.workload
    if work.prompts is None:
        vocabulary = plan.architecture.config.get_text_config().vocab_size
        return prompts(
            batch_size=work.sequences,
            prompt_len=work.prompt_len,
            vocab_size=vocabulary,
            seed=work.seed,
            rank=rank,
            ranks=ranks,
        )
    return _share(from_text(plan), rank, ranks)


def from_text(plan: Plan) -> Any:
    """Return the prompts of all ranks: the first windows of `workload.prompts`, int64 of shape (sequences, prompt_len).

    Raises `ConfigError` as `text.tokens` does, and when the text is too short.
    """
    work = plan.run.workload
    found = text.tokens(plan, "prompts")
    windows = found.windows(work.prompt_len)
    if len(windows) < work.sequences:
        taken = work.prompt_len - len(found.begin)
        raise ConfigError(
            f"{found.setting} has {len(found.ids)} tokens and {work.sequences} prompts of {taken} take "
            f"{work.sequences * taken}: pass a longer text{_shorter(plan, len(windows), len(found.ids), len(found.begin))}"
        )
    return windows[: work.sequences]


def _shorter(plan: Plan, windows: int, tokens: int, begin: int) -> str:
    """Return further advice: the settings for which a text with so many windows and tokens is long enough."""
    work, ranks = plan.run.workload, plan.run.hardware.num_gpus
    batch, length = windows // work.micro_batches // ranks * ranks, tokens // work.sequences + begin
    advice = [f"workload.batch_size={batch}"] * (batch > 0) + [f"workload.prompt_len={length}"] * (length > 1)
    return "".join(f", or {each}" for each in advice)


def prompts(*, batch_size: int, prompt_len: int, vocab_size: int, seed: int, rank: int = 0, ranks: int = 1) -> Any:
    """Return the prompts of one rank: random ids in [4, vocab_size), never padding.

    They are int64 of shape (batch_size / ranks, prompt_len); the first ranks have one more if there is a rest. The whole
    batch depends on the seed alone, so that all numbers of ranks together hold the same sequences.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    low = FIRST_ID if vocab_size > 2 * FIRST_ID else 0
    batch = torch.randint(low, vocab_size, (batch_size, prompt_len), generator=generator)
    return _share(batch, rank, ranks)


def _share(batch: Any, rank: int, ranks: int) -> Any:
    return batch.tensor_split(ranks)[rank]
