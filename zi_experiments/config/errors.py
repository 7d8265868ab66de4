"""What to type instead of what Hydra cannot read, find or fill in."""

import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import is_dataclass
from difflib import get_close_matches
from enum import EnumType
from itertools import takewhile
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import CompactHydraException, MissingConfigException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from zi_experiments.config.schema import Run, conf_dir, typed

_KINDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
}
_FREE = ("hydra", "model.architecture", "hardware.calibration.gemm_flops")  # below them keys are no settings of ours


def of_flags(arguments: list[str]) -> str | None:
    """What to type instead of settings that look like flags, as `wandb agent` passes them, or that flags have torn apart."""
    unknown = typed(arguments).unknown
    flags = [flag for flag in unknown if flag.startswith("--")]
    if not flags:
        torn = [word for word in unknown if not word.startswith("-")]
        return f"{' '.join(torn)}: pass flags such as -m before all settings, or after them" if torn else None
    settings = [flag.lstrip("-") if "=" in flag else f"{flag.lstrip('-')}=…" for flag in flags]
    return f"{' '.join(flags)}: pass {' '.join(settings)}; wandb agent does with ${{args_no_hyphens}} in the sweep's command"


def of_error(error: Exception, arguments: list[str]) -> str:
    """An error of Hydra's in one line, with what to type where that is known."""
    found = typed(arguments)
    if isinstance(error, OverrideParseException):
        return _of_grammar(error, found.overrides, found.multirun)
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        return _of_choice(error.missing_cfg_file, error.options)
    with suppress(ValueError):  # numbers that Python does not read: the error says so itself
        for override in OverridesParser.create().parse_overrides(found.overrides):
            if problem := _of_override(override, found.multirun, str(error)):
                return problem
    if problem := _of_value(error):
        return problem
    reason = (
        f" ({_first_line(error.__cause__)})" if isinstance(error, CompactHydraException) and error.__cause__ else ""
    )
    return (_first_line(error) if isinstance(error, OmegaConfBaseException) else " ".join(str(error).split())) + reason


def of_stray(key: str, known: Iterable[str]) -> list[str]:
    """The settings of which one was probably meant by a key that is none; none, where nothing is like it."""
    group, _, last = key.rpartition(".")
    ends = [(name.rpartition("."), name) for name in known]
    beside = {end: name for (parent, _, end), name in ends if parent == group}
    if meant := closest(last, beside):
        return [beside[meant]]
    return [name for (_, _, end), name in ends if end == last]


def of_missing(cfg: DictConfig) -> str | None:
    """Every setting without a value in one line, each with a value that could be typed; None: there is none."""
    missing = sorted(_missing(OmegaConf.to_container(cfg), ""))
    if not missing:
        return None
    examples = shlex.join(f"{key}={_example(key)}" for key in missing)
    return f"{', '.join(missing)}: no value given: pass {examples}, or write them in the file of the choice"


def closest(word: str, known: Iterable[str]) -> str | None:
    """What is there and spelt most like a word; None: nothing is."""
    folded = {each.casefold(): each for each in known}
    found = get_close_matches(word.casefold(), folded, n=1)
    return folded[found[0]] if found else None


def settings(schema: type = Run, prefix: str = "") -> Iterator[str]:
    """The dotted name of every setting, and of every group of them."""
    for name, hint in get_type_hints(schema).items():
        yield f"{prefix}{name}"
        kind = schema_of(hint)
        if isinstance(kind, type) and is_dataclass(kind):
            yield from settings(kind, f"{prefix}{name}.")


def schema_of(hint: Any) -> Any:
    """The type itself of one that may be None."""
    return next((kind for kind in get_args(hint) if is_dataclass(kind)), hint)


def _of_grammar(error: OverrideParseException, overrides: list[str], is_sweep: bool) -> str:
    key, equals, value = error.override.partition("=")
    if not equals:
        return _of_word(error.override, overrides)
    quoted = _quoted(key, value, is_sweep)
    if not _is_grammar(quoted):
        return f"{error.override} is not KEY=VALUE as Hydra reads it: {_first_line(error)}"
    return f"{error.override} is not as Hydra reads it: quote it, with all of these quotes: {shlex.quote(quoted)}"


def _of_word(word: str, overrides: list[str]) -> str:
    """What to say of a word without an equals sign: mostly a part of the value before it, which has spaces."""
    at = overrides.index(word)
    if at == 0:
        return f"{word} has no value: pass GROUP=CHOICE or KEY=VALUE"
    words = takewhile(lambda each: "=" not in each, overrides[at:])
    key, _, value = " ".join([overrides[at - 1], *words]).partition("=")
    whole = shlex.quote(_quoted(key, value, is_sweep=False))
    return f"{word} has no value: where it belongs to the value before it, quote both: {whole}"


def _of_choice(missing: str, options: Iterable[str]) -> str:
    group, _, choice = missing.rpartition("/")
    meant = closest(choice, options)
    instead = f"pass {group}={meant}; there are" if meant else "pass one of"
    return f"{group}={choice} is no choice: {instead} {', '.join(options)}"


def _of_override(override: Override, is_sweep: bool, error: str) -> str | None:
    """What is wrong with an override that can be read."""
    text, key = override.input_line or "", override.key_or_group
    _, _, value = text.partition("=")
    if not key:
        return f"{text} has no key: pass GROUP=CHOICE or KEY=VALUE"
    if override.is_sweep_override() and not is_sweep:
        return f"{text} has several values: pass -m to run each, or {shlex.quote(f'{key}={_in_quotes(value)}')} for one"
    if key.startswith("hardware.calibration.") and "Unexpected type" in error:
        return (
            f"{text} sets a part of hardware.calibration, which is null: pass hardware=… of a file that "
            "python -m zi_experiments.hardware has written"
        )
    known = [*settings(), *_groups()]
    if override.is_add() or key in known or any(f"{key}.".startswith((f"{free}.", f"{free}/")) for free in _FREE):
        return None
    meant = " or ".join(text.replace(key, name, 1) for name in of_stray(key, known))
    instead = f"pass {meant}" if meant else "python -m zi_experiments --cfg job shows those there are"
    return f"{key} is not a setting: {instead}"


def _of_value(error: Exception) -> str | None:
    """What to type instead of a value of another type than its setting takes; None: the error is another one."""
    override = str(error).removeprefix("Error merging override ")
    key = override.lstrip("+").partition("=")[0]
    if not isinstance(error.__cause__, ValidationError) or key not in settings():
        return None
    hint: Any = Run
    for name in key.split("."):
        hint = get_type_hints(schema_of(hint))[name]
    return f"{override}: {key} takes {_taken(hint)}: pass {shlex.quote(f'{key}={_example(key)}')}"


def _taken(hint: Any) -> str:
    """What values of a type are, in words."""
    if isinstance(hint, UnionType):
        return f"{_taken(get_args(hint)[0])}, or null"
    if isinstance(hint, EnumType):
        return " or ".join(name for name in hint.__members__)
    return _KINDS.get(get_origin(hint) or hint, "settings in braces")


def _groups() -> set[str]:
    return {path.name for path in conf_dir().iterdir() if path.is_dir()}


def _quoted(key: str, value: str, is_sweep: bool) -> str:
    values = value.split(",") if is_sweep and value[:1] not in ("[", "{") else [value]
    return f"{key}={','.join(map(_readable, values))}"


def _readable(value: str) -> str:
    """A value as Hydra's grammar has it: as it is, or with keys without quotes, or in quotes."""
    forms = (value, re.sub(r"""(["'])(\w+)\1\s*:""", r"\2:", value), _in_quotes(value))
    return next((form for form in forms if _is_grammar(f"key={form}")), value)


def _in_quotes(value: str) -> str:
    return QuotedString(text=value, quote=Quote.double).with_quotes()


def _is_grammar(override: str) -> bool:
    try:
        OverridesParser.create().parse_overrides([override])
    except OverrideParseException:
        return False
    return True


def _missing(node: Any, prefix: str) -> Iterator[str]:
    """The settings without a value, whether or not others can be resolved."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if value == MISSING:
            yield f"{prefix}{key}"
        yield from _missing(value, f"{prefix}{key}.")


def _example(key: str) -> str:
    """A value that a setting could have: that of the default choice."""
    if key.endswith(".name") and key != "engine.name":
        return "mine"
    main = OmegaConf.load(conf_dir() / "config.yaml")
    group, _, inside = key.partition(".")
    choice = next((entry[group] for entry in main.defaults if isinstance(entry, DictConfig) and group in entry), None)
    known = OmegaConf.load(conf_dir() / group / f"{choice}.yaml") if choice else main
    value = OmegaConf.select(known, inside if choice else key)
    plain: Any = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return Override._get_value_element_as_str(plain)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
