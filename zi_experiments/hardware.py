"""`python -m zi_experiments.hardware`: measure this machine anew, show its rates, write them as a `hardware` choice."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from zi_experiments import lines
from zi_experiments.calibration import child, export, suite
from zi_experiments.config.composition import from_choices
from zi_experiments.config.schema import ConfigError, conf_dir
from zi_experiments.engines import base
from zi_experiments.runtime import caches, signals, stdio
from zi_experiments.system.disk import folder_problem
from zi_experiments.system.machines import detect


def main() -> int:
    """Return 0, 1 if the machine could not be measured, or 130 if stopped. Bad arguments end with a line on stderr."""
    stdio.install()
    parser = argparse.ArgumentParser(prog="python -m zi_experiments.hardware", description=__doc__)
    parser.add_argument(
        "--path", type=Path, nargs="+", default=[], metavar="FOLDER", help="measure these disks too, together"
    )
    parser.add_argument("--name", help="name of the choice; default: that of the GPU or processor")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: NAME.yaml among the hardware choices")
    parser.add_argument("--request", help=argparse.SUPPRESS)  # from a launcher, which reads the answer
    arguments = parser.parse_args()
    if arguments.request is not None:
        child.answer(arguments.request)
        return 0
    signals.install()
    try:
        return _measure(arguments.path, arguments.name, arguments.output)
    except ConfigError as error:
        sys.exit(lines.fit(f"refused: {error}", sys.stderr))
    except KeyboardInterrupt:
        signals.acknowledge()
        return 130


def _measure(folders: list[Path], name: str | None, output: Path | None) -> int:
    for folder in folders:
        if problem := folder_problem("--path ", folder):
            raise ConfigError(problem)
    if line := caches.settle():
        _say(line)
    run = from_choices({"hardware": "auto", "engine": "stream"}, {})
    disk = base.get(run.engine.name).disk_access(run, folders) if folders else None
    machine = detect(run.hardware)
    shipped = conf_dir() / "hardware"
    name = name or (output.stem if output is not None else export.default_name(machine))
    path = export.destination(name, output, shipped)
    measured = suite.measure(run.hardware, machine, disk, _say)
    if measured.calibration is None or measured.calibration.host_bytes_per_s is None:
        return 1  # the reason has been printed
    Console().print(export.table(measured))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(export.text(measured, name))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): pass another --output") from error
    print(f"written to {path}\n{export.usage(path, shipped)}")
    return 0


def _say(line: str) -> None:
    print(lines.fit(line, sys.stderr), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
