"""The files of `workload.text` and `workload.prompts` as tokens of the checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

from zi_experiments.config.schema import ConfigError, Workload
from zi_experiments.cost_model.plan import Plan
from zi_experiments.models.configuration import source_of
from zi_experiments.models.remote_code import is_refused_code, refused_code

KEYS = ("text", "prompts")  # of a workload, in which a text file is named


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """A text as the checkpoint's tokenizer encodes it, without special tokens."""

    setting: str  # that named the file, as typed
    begin: list[int]  # the token that the tokenizer puts first in every sequence; empty without one
    ids: list[int]

    def windows(self, length: int) -> Any:
        """Return the text in windows, one after the other: int64 of shape (windows, length). The rest is dropped.

        Each window begins with `begin`; `length` is larger than that.
        """
        import torch

        taken = length - len(self.begin)
        count = len(self.ids) // taken
        cut = torch.tensor(self.ids[: count * taken], dtype=torch.int64).view(count, taken)
        return torch.cat([torch.tensor(self.begin, dtype=torch.int64).expand(count, -1), cut], 1)


def tokens(plan: Plan, key: str) -> Tokens:
    """Return the tokens of the file that `workload.KEY` names.

    Raises `ConfigError` when the file cannot be read, and when the checkpoint has no tokenizer for its model.
    """
    path, setting = plan.run.weights.path, _setting(plan.run.workload, key)
    encode = tokenizer(plan)
    if encode is None:
        raise ConfigError(
            f"workload.{key} needs the model's tokenizer and {path} has none that loads: save it there (tokenizer.json), "
            f"or pass workload.{key}=null"
        )
    ids = encode(_read(plan.run.workload, key), add_special_tokens=False, verbose=False).input_ids
    vocabulary = plan.architecture.config.get_text_config().vocab_size
    if max(ids, default=0) >= vocabulary:
        raise ConfigError(
            f"the tokenizer of {path} gives token {max(ids)} and the model knows {vocabulary}: "
            "pass weights.path=… with the tokenizer of this model"
        )
    return Tokens(setting=setting, begin=_beginning(encode), ids=ids)


def _beginning(tokenizer: Any) -> list[int]:
    """Return the token that the tokenizer puts first in every sequence, in a list; the list is empty without one."""
    first: list[int] = tokenizer("a").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def check(work: Workload) -> None:
    """Raise `ConfigError` when a file that the workload names is not a file with UTF-8 text."""
    for key in KEYS:
        if getattr(work, key) is not None:
            _read(work, key)


def _setting(work: Workload, key: str) -> str:
    return f"workload.{key}={getattr(work, key)}"


def _read(work: Workload, key: str) -> str:
    path, setting = Path(getattr(work, key)).expanduser(), _setting(work, key)
    try:
        if not S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{setting} is not a file: pass a text file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{setting} cannot be read ({error.strerror}): pass a text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{setting} is not UTF-8: pass a text file in UTF-8") from error
    if not text.strip():
        raise ConfigError(f"{setting} is empty: pass a text file")
    return text


def tokenizer(plan: Plan) -> Any | None:
    """Return the tokenizer of the run's checkpoint; None when none can be loaded.

    Raises `ConfigError` when it is Python code that the user has not trusted.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    path, trusted = plan.run.weights.path, plan.run.trust_remote_code
    assert path is not None
    source, how = source_of(path)
    commit = getattr(plan.architecture.config, "_commit_hash", None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted, revision=commit or "main", **how)
    except Exception as error:  # a broken file can raise any error
        if is_refused_code(error, trusted):
            raise ConfigError(refused_code(path, get_tokenizer_config(source)["auto_map"])) from error
        return None
    # without its files, transformers makes an empty tokenizer for some families
    return tokenizer if len(tokenizer) > len(set(tokenizer.all_special_ids)) else None
