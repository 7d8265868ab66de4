"""Build a typed, validated `Run`, from a Hydra configuration or from choices without Hydra."""

from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, get_type_hints

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zi_experiments.config import errors
from zi_experiments.config.resolvers import register
from zi_experiments.config.schema import ConfigError, Run, conf_dir
from zi_experiments.config.validation import validate


def to_run(cfg: DictConfig) -> Run:
    """Return the typed run of a composed configuration.

    Raises `ConfigError` for a missing value, a key that is not in the schema, or choices that exclude each other.
    """
    try:
        if problem := errors.of_missing(cfg):
            raise ConfigError(problem)
        _refuse_stray_keys(cfg, Run, "")
        run: Run = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        message = str(error).splitlines()[0]
        raise ConfigError(f"{key or 'configuration'}: {message}" + (f": pass {key}=…" if key else "")) from error
    validate(run)
    return run


def composed_run(cfg: DictConfig) -> Run:
    """Return the run that Hydra has composed for a command, with what was typed: a search does not vary that."""
    run = to_run(cfg)
    return replace(run, search=replace(run.search, typed=list(HydraConfig.get().overrides.task)))


def from_choices(choices: dict[str, str], settings: dict[str, Any]) -> Run:
    """Return a run without Hydra: the defaults of `conf/config.yaml`, then `choices`, then `settings` by dotted name."""
    register()
    main: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "config.yaml"))
    defaults = {
        group: choice for entry in main["defaults"] if isinstance(entry, dict) for group, choice in entry.items()
    }
    parts = {
        str(group): OmegaConf.load(conf_dir() / str(group) / f"{choice}.yaml")
        for group, choice in (defaults | choices).items()
        if choice is not None and group in {field.name for field in fields(Run)}
    }
    root = {field.name: main[field.name] for field in fields(Run) if field.name in main}
    cfg = OmegaConf.merge(OmegaConf.structured(Run), OmegaConf.load(conf_dir() / "optional.yaml"), root, parts)
    assert isinstance(cfg, DictConfig)
    for key, value in settings.items():
        OmegaConf.update(cfg, key, value)
    return to_run(cfg)


def choose(run: Run, group: str, choice: str) -> None:
    """Change `run` in place as `GROUP=CHOICE` on its command line would: values the user set in that group stay."""
    node = getattr(run, group)
    before, after = _choice(group, getattr(node, "name", None) or node.device.value), _choice(group, choice)
    for field in fields(node):
        name = field.name
        if before is None or getattr(node, name) == getattr(before, name):
            setattr(node, name, deepcopy(getattr(after, name)))


@cache
def _choice(group: str, choice: str) -> Any:
    """Return the content of a choice's YAML file; None when it is not a shipped file but one in a user's folder."""
    path = conf_dir() / group / f"{choice}.yaml"
    schema = get_type_hints(Run)[group]
    return (
        OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path)))
        if path.is_file()
        else None
    )


def _refuse_stray_keys(cfg: DictConfig, schema: type, prefix: str) -> None:
    hints = get_type_hints(schema)
    known = {field.name for field in fields(schema)}
    for key in map(str, cfg):
        if key not in known:
            raise ConfigError(
                f"{prefix}{key} is not a setting (it was added with '+'){_instead(cfg, key, known, prefix)}"
            )
        node, kind = cfg._get_node(key), errors.schema_of(hints[key])
        if not isinstance(node, DictConfig | ListConfig) or OmegaConf.is_missing(cfg, key):
            continue
        value = cfg[key]  # an interpolation can resolve to any type
        plain, form = (list, "[…]") if isinstance(node, ListConfig) else (dict, "{…}")
        found = OmegaConf.get_type(value) if OmegaConf.is_config(value) else type(value)
        if found is not (kind if is_dataclass(kind) else plain) and not (value is None and node._is_optional()):
            raise ConfigError(f"{prefix}{key}={value} has the wrong type: pass {prefix}{key}={form}")
        if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, DictConfig):
            _refuse_stray_keys(value, kind, f"{prefix}{key}.")


def _instead(cfg: DictConfig, key: str, known: set[str], prefix: str) -> str:
    choices = [f"{prefix}{name}" for name in sorted(known)]
    meant = " or ".join(f"{name}={cfg[key]}" for name in errors.of_stray(f"{prefix}{key}", errors.settings()))
    return f": pass {meant}" if meant else f". Known here: {', '.join(choices)}"
