"""Finds records in folders and files, and makes runs of them."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zi_experiments.config.schema import ConfigError
from zi_experiments.report import committed, runs
from zi_experiments.report.runs import Run

NAME = "result.json"
_NAMES = (NAME, "plan.json")  # of a folder that has both, what was measured counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    runs: list[Run]
    skipped: list[str]  # a line for each file that was not read


def read(paths: list[Path]) -> Found:
    """The runs of all files in the paths, in the order of the paths and of the names in them, each file once.

    Raises ConfigError for a path that is not there.
    """
    found, skipped = list[Run](), list[str]()
    for path in dict.fromkeys(file for each in paths for file in _files(each)):
        try:
            content = _content(path)
            found += [runs.from_record(record, str(path)) for record in committed.records(content)]
        except committed.NotReadableError as error:
            skipped.append(f"skipped {path}: {error}")
        except (ValueError, RecursionError) as error:
            skipped.append(f"skipped {path}: it is not JSON, or not all of it ({str(error).splitlines()[0]})")
        except OSError as error:
            skipped.append(f"skipped {path}: {error.strerror}")
    return Found(runs=found, skipped=skipped)


def _content(path: Path) -> Any:
    import orjson  # here, where a package that is not installed is said in a line

    raw = path.read_bytes()
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return json.loads(raw)  # slower, and takes NaN and every encoding of Unicode


def _files(path: Path) -> Iterator[Path]:
    """A file itself; of a folder every `result.json` and `plan.json` below it, or if there is none its own JSON files."""
    if path.is_file():
        yield path
    elif path.is_dir():
        below = [
            os.path.join(folder, next(filter(names.__contains__, _NAMES)))
            for folder, _, names in os.walk(path)
            if not set(_NAMES).isdisjoint(names)
        ]
        found = map(Path, sorted(below or map(str, path.glob("*.json")), key=_numbered))
        yield from (each for each in found if each.is_file() or each.is_symlink())  # nobody may ever write to a pipe
    else:
        raise ConfigError(f"{path} is not there: name a folder with runs, such as outputs, or a {NAME}")


def _numbered(path: str) -> list[str]:
    """Sorts run 2 of a sweep before run 10."""
    return [part.zfill(12) if part.isdigit() else part for part in re.split(r"(\d+)", path)]
