"""Result files that hold more than one record, or less than a whole one: those of `docs/results/`."""

import shlex
from functools import cache
from typing import Any

import yaml

from zi_experiments.config.schema import conf_dir
from zi_experiments.results.record import SCHEMA_VERSION

Json = dict[str, Any]


class NotReadableError(ValueError):
    """A file is no record that this version reads; the message says why."""


def records(content: Any) -> list[Json]:
    """The records in a file's content; those that are not whole have what is known of them, and no other key.

    Raises NotReadableError for content without runs, and for records of another schema.
    """
    if not isinstance(content, dict):
        raise NotReadableError("it holds no runs")
    if "schema_version" in content:
        return [_checked(content)]
    runs, cases = content.get("runs"), content.get("cases")
    if isinstance(runs, list):
        found = [_checked(each) for each in runs]
    elif isinstance(cases, dict):
        found = [_of_case(name, each) for name, each in cases.items() if _is_run(each)]
    elif isinstance(runs, dict):
        shared = content.get("environment")
        found = [_of_figures(name, each, shared) for name, each in runs.items() if _is_run(each)]
    else:
        found = []
    if not found:
        raise NotReadableError("it holds no runs")
    return found


def _checked(record: Any) -> Json:
    if not isinstance(record, dict) or "status" not in record:
        raise NotReadableError("it holds no runs")
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise NotReadableError(f"its schema_version is {version}, and this version reads {SCHEMA_VERSION}")
    return record


def _is_run(entry: Any) -> bool:
    """Return whether an entry of a file is a run, and no other figures: what was run is known, and how it ended."""
    return isinstance(entry, dict) and {"command", "status"} <= entry.keys()


def _of_case(name: str, case: Json) -> Json:
    """A case of `make bench-gpu` or `make bench-cpu`."""
    kind, _, message = str(case.get("error") or "").partition(": ")
    error = {"type": kind if message else None, "message": message or kind} if kind else None
    return case | _asked(name, case) | {"error": error}


def _of_figures(name: str, figures: Json, environment: Any) -> Json:
    """A run of which the figures were kept, beside its command."""
    plan = {"placement": figures.get("placement")}
    return _asked(name, figures) | {
        "status": figures.get("status"),
        "environment": environment,
        "metrics": figures,
        "plan": plan,
        "verification": figures.get("verification"),
    }


def _asked(name: str, entry: Json) -> Json:
    """What a command asks for: the choice of each group, and the values that it names."""
    command = str(entry.get("command") or "")
    words = [word.lstrip("+~").partition("=") for word in shlex.split(command) if "=" in word]
    typed = {key: yaml.safe_load(value) for key, _, value in words}
    defaults = _default_choices()
    return {
        "run": {"name": name, "command": command or None, "started_at": entry.get("started_at")},
        "choices": defaults | {key: value for key, value in typed.items() if key in defaults},
        "config": {key: value for key, value in typed.items() if key not in defaults},
    }


@cache
def _default_choices() -> dict[str, str]:
    defaults = yaml.safe_load((conf_dir() / "config.yaml").read_text())["defaults"]
    groups = [each for each in defaults if isinstance(each, dict)]
    return {key: value for each in groups for key, value in each.items() if "override" not in key and value}
