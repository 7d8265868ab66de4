"""What `python -m zi_experiments.report` is told, and what it does then."""

import argparse
import gc
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from zi_experiments import lines
from zi_experiments.config.schema import ConfigError
from zi_experiments.report import reading
from zi_experiments.report.comparison import Comparison
from zi_experiments.report.runs import Run, labels

_INSTALL = "pip install polars plotly jinja2 orjson numpy PyYAML"  # the extra `report`


def main(arguments: Sequence[str]) -> int:
    """Write a report, or show a comparison. Returns the exit code."""
    gc.disable()  # ten thousand records are many objects, and none of them is garbage
    try:
        return _compare(arguments[1:]) if arguments[:1] == ["compare"] else _report(arguments)
    except ConfigError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "zi_experiments":
            raise
        print(f"refused: {package} is not installed: {_INSTALL}", file=sys.stderr)  # a command, in one line
        return 1
    except OSError as error:
        return _refuse(f"{error.filename} cannot be written ({error.strerror}): pass --output /another/folder")


def _report(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m zi_experiments.report",
        description="A page and tables of finished runs: report.html, report.csv, report.md, report.parquet, "
        "and their times in the forms of llama-bench and optimum-benchmark.",
        epilog="python -m zi_experiments.report compare A B: two runs or sweeps against each other",
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="folder with runs, or a result file")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/report"), metavar="FOLDER", help="default: outputs/report"
    )
    asked = parser.parse_args(arguments)
    runs = _read(asked.paths)

    from zi_experiments.report import exchange, page, picture, tables

    asked.output.mkdir(parents=True, exist_ok=True)
    names = labels(runs)
    paths = [page.write(runs, names, asked.output), *picture.write(runs, asked.output)]
    paths += [*tables.write(runs, names, asked.output), *exchange.write(runs, names, asked.output)]
    print(*paths, sep="\n")
    return 0


def _compare(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m zi_experiments.report compare",
        description="Two runs, or two sweeps, against each other: ratios B / A of all figures, and what else differs.",
    )
    for name in ("A", "B"):
        parser.add_argument(name, type=Path, help="folder with a run or a sweep, or a result file")
    parser.add_argument(
        "--fail-below",
        type=_ratio,
        metavar="RATIO",
        help="exit with 1 if decode_tok_per_s of B is below this share of A in any pair",
    )
    asked = parser.parse_args(arguments)
    before, after = _read([asked.A]), _read([asked.B])

    from zi_experiments.report import comparison, comparison_tables

    compared = comparison.compare(before, after)
    comparison_tables.show(compared, Console())
    return 0 if asked.fail_below is None else _judge(compared, asked.fail_below)


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = math.nan
    if not 0 < ratio < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a ratio: pass a number above 0, such as 0.95")
    return ratio


def _judge(compared: Comparison, least: float) -> int:
    """The exit code: 1 when a run of B is too slow, has failed where that of A had not, or nothing can be said."""
    judged = [pair for pair in compared.pairs if pair.decode.before is not None]
    if not judged:
        return _refuse("--fail-below needs a run in A with decode_tok_per_s: workload.gen_len has to be above 1")
    below = [pair for pair in judged if pair.decode.ratio is None or pair.decode.ratio < least]
    for pair in below:
        ratio = "absent" if pair.decode.ratio is None else f"{pair.decode.ratio:.3f}"
        print(f"below {least:g}: decode B / A is {ratio} for {pair.name or pair.after.row['name']}")
    return 1 if below else 0


def _read(paths: list[Path]) -> list[Run]:
    found = reading.read(paths)
    for line in found.skipped:
        print(lines.fit(line, sys.stderr), file=sys.stderr)
    if not found.runs:
        raise ConfigError(
            f"no runs in {' '.join(map(str, paths))}: name a folder that has a {reading.NAME} or a plan.json"
        )
    return found.runs


def _refuse(text: str) -> int:
    print(lines.fit(f"refused: {text}", sys.stderr), file=sys.stderr)
    return 1
