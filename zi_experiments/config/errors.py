"""Error messages that say what to type instead of an argument that Hydra cannot parse, find or resolve."""

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

from zi_experiments.config.command_line import literal, typed
from zi_experiments.config.schema import Run, conf_dir

_KINDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
}
_FREE = ("hydra", "model.architecture", "hardware.calibration.gemm_flops")  # keys below these are not in the schema


def of_flags(arguments: list[str]) -> str | None:
    """Return what to type instead of settings passed as flags, as `wandb agent` does, or split by flags; None: no such."""
    unknown = typed(arguments).unknown
    flags = [flag for flag in unknown if flag.startswith("--")]
    if not flags:
        torn = [word for word in unknown if not word.startswith("-")]
        return f"{' '.join(torn)}: pass flags such as -m before all settings, or after them" if torn else None
    settings = [flag.lstrip("-") if "=" in flag else f"{flag.lstrip('-')}=…" for flag in flags]
    return f"{' '.join(flags)}: pass {' '.join(settings)}; wandb agent does so if the sweep's command has ${{args_no_hyphens}}"


def of_error(error: Exception, arguments: list[str]) -> str:
    """Return a Hydra error in one line, with what to type where that is known."""
    found = typed(arguments)
    if isinstance(error, OverrideParseException):
        return _of_grammar(error, found.overrides, found.multirun)
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        return _of_choice(error.missing_cfg_file, error.options)
    with suppress(ValueError):  # numbers that Python cannot parse: the error itself says so
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
    """Return the settings that an unknown key probably means; empty when none is similar."""
    group, _, last = key.rpartition(".")
    ends = [(name.rpartition("."), name) for name in known]
    beside = {end: name for (parent, _, end), name in ends if parent == group}
    if meant := closest(last, beside):
        return [beside[meant]]
    return [name for (_, _, end), name in ends if end == last]


def of_missing(cfg: DictConfig) -> str | None:
    """Return one line that names every setting without a value, with an example for each; None when all have one."""
    missing = sorted(_missing(OmegaConf.to_container(cfg), ""))
    if not missing:
        return None
    examples = shlex.join(f"{key}={_example(key)}" for key in missing)
    return f"{', '.join(missing)}: no value given: pass {examples}, or write them in the file of the choice"


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word whose spelling is closest, upper and lower case being equal; None when none is close."""
    folded = {each.casefold(): each for each in known}
    found = get_close_matches(word.casefold(), folded, n=1)
    return folded[found[0]] if found else None


def settings(schema: type = Run, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting and of every group of settings."""
    for name, hint in get_type_hints(schema).items():
        yield f"{prefix}{name}"
        kind = schema_of(hint)
        if isinstance(kind, type) and is_dataclass(kind):
            yield from settings(kind, f"{prefix}{name}.")


def schema_of(hint: Any) -> Any:
    """Return the dataclass in a type hint such as `Calibration | None`; any other hint unchanged."""
    return next((kind for kind in get_args(hint) if is_dataclass(kind)), hint)


def _of_grammar(error: OverrideParseException, overrides: list[str], is_sweep: bool) -> str:
    key, equals, value = error.override.partition("=")
    if not equals:
        return _of_word(error.override, overrides)
    quoted = _quoted(key, value, is_sweep)
    if not _is_grammar(quoted):
        return f"{error.override} cannot be parsed by Hydra as KEY=VALUE: {_first_line(error)}"
    return f"{error.override} cannot be parsed by Hydra: quote it, with all of these quotes: {shlex.quote(quoted)}"


def _of_word(word: str, overrides: list[str]) -> str:
    """Return the message for a word without an equals sign: mostly a part of the value before it, which has spaces."""
    at = overrides.index(word)
    if at == 0:
        return f"{word} has no value: pass GROUP=CHOICE or KEY=VALUE"
    words = takewhile(lambda each: "=" not in each, overrides[at:])
    key, _, value = " ".join([overrides[at - 1], *words]).partition("=")
    whole = shlex.quote(_quoted(key, value, is_sweep=False))
    return f"{word} has no value: if it belongs to the value before it, quote both: {whole}"


def _of_choice(missing: str, options: Iterable[str]) -> str:
    group, _, choice = missing.rpartition("/")
    meant = closest(choice, options)
    instead = f"pass {group}={meant}; there are" if meant else "pass one of"
    return f"{group}={choice} is not a choice: {instead} {', '.join(options)}"


def _of_override(override: Override, is_sweep: bool, error: str) -> str | None:
    """Return the message for an override that parses but is wrong; None when nothing is found."""
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
    instead = f"pass {meant}" if meant else "python -m zi_experiments --cfg job shows all settings"
    return f"{key} is not a setting: {instead}"


def _of_value(error: Exception) -> str | None:
    """Return what to type instead of a value of the wrong type; None when the error is a different one."""
    override = str(error).removeprefix("Error merging override ")
    key = override.lstrip("+").partition("=")[0]
    if not isinstance(error.__cause__, ValidationError) or key not in settings():
        return None
    hint: Any = Run
    for name in key.split("."):
        hint = get_type_hints(schema_of(hint))[name]
    return f"{override}: {key} takes {_taken(hint)}: pass {shlex.quote(f'{key}={_example(key)}')}"


def _taken(hint: Any) -> str:
    """Return a description of the values of a type: "an integer, or null"."""
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
    """Return a value in Hydra's grammar: unchanged, or with its keys unquoted, or in quotes."""
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
    """Yield the settings without a value, even if interpolations in others cannot be resolved."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if value == MISSING:
            yield f"{prefix}{key}"
        yield from _missing(value, f"{prefix}{key}.")


def _example(key: str) -> str:
    """Return an example value for a setting: that of the default choice."""
    if key.endswith(".name") and key != "engine.name":
        return "mine"
    main = OmegaConf.load(conf_dir() / "config.yaml")
    group, _, inside = key.partition(".")
    choice = next((entry[group] for entry in main.defaults if isinstance(entry, DictConfig) and group in entry), None)
    known = OmegaConf.load(conf_dir() / group / f"{choice}.yaml") if choice else main
    value = OmegaConf.select(known, inside if choice else key)
    plain: Any = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return literal(plain) if isinstance(plain, bool) else Override._get_value_element_as_str(plain)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
