"""The engines against what this machine can do, measured in the same job: a table, and docs/results/bench-NAME.json.

python benchmarks/bench.py [--cpu] [--list] [--override KEY=VALUE] [NAME …]        NAME: a group, or GROUP/ENGINE
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cases import CASES, CPU_CASES, Case, Entries, Entry, scaling
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from zi_experiments.system.machines import Machine

ROOT = Path(__file__).resolve().parents[1]
SHARES = ("of the\nbound", "predicted")  # measured against both
sys.path.insert(0, str(ROOT))  # the checkout, whether it is installed or not
TRIES = 3  # of a case on a machine that others use as well
STEADY = 0.15  # the first of them counts during which rates have changed by less than this share
ROWS = (8, 512)  # of products like those of the cases' decode steps and prefills
DISK_S = 4.0  # that it is read for: what others do there changes from one second to the next


def arguments(one: Case, measured: dict[str, float]) -> list[str]:
    """What a user would type after `python -m zi_experiments`."""
    found = [f"hardware.ceilings.{name}={value:.4g}" for name, value in measured.items()]
    found += ["hardware.ceilings.source=measured"] if measured else []
    return ["workload=zero-inference", "tracking=none", *found, *one.overrides]


def with_extra(one: Case, extra: list[str]) -> Case:
    """The case with what is added to all commands: to one that has nothing on disk no path there."""
    kept = [each for each in extra if one.on_disk or not each.startswith("offload.path=")]
    return replace(one, overrides=(*one.overrides, *kept))


def execute(typed: list[str], folder: Path, timeout_s: float) -> tuple[Entry | None, str]:
    """Run a command; its record, if it left one, and its output. All of its processes end with it."""
    command = [sys.executable, "-m", "zi_experiments", *typed, f"hydra.run.dir={folder}"]
    folder.mkdir(parents=True)
    log = folder / "output.txt"
    with log.open("w") as output:
        child = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            print(f"  stopped after {timeout_s:.0f} s", flush=True)
        finally:
            _end(child)
    result = folder / "result.json"
    return (json.loads(result.read_text()) if result.is_file() else None), log.read_text(errors="replace")


def _end(child: subprocess.Popen[bytes]) -> None:
    for sent, patience_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        if child.poll() is None:
            os.killpg(child.pid, sent)
            with suppress(subprocess.TimeoutExpired):
                child.wait(patience_s)


def to_entry(record: Entry | None, output: str, typed: list[str], measured: dict[str, float]) -> Entry:
    """What is kept of a run: nothing that names this machine."""
    shown = [each for each in typed if not each.startswith("offload.path=")]
    entry: Entry = {"command": "python -m zi_experiments " + shlex.join(shown), "ceilings": measured, "targets": []}
    if record is None:
        tail = " | ".join([line.strip() for line in output.splitlines() if line.strip()][-5:])
        return entry | {"status": "error", "error": _without_paths(tail or "no output"), "metrics": None}
    engine = {key: value for key, value in (record["engine_config"] or {}).items() if key not in ("folder", "folders")}
    error, around = record["error"], record["environment"] or {}
    kept = ("packages", "python", "gpu", "gpu_memory_bytes", "driver", "cpu", "cpu_cores", "host_memory_bytes")
    return entry | {
        "status": record["status"],
        "error": _without_paths(f"{error['type']}: {error['message']}") if error else None,
        "started_at": record["run"]["started_at"],
        **{key: record[key] for key in ("metrics", "samples", "plan", "verification")},
        "engine_config": engine or None,
        "environment": {key: around.get(key) for key in kept},
    }


def _without_paths(text: str) -> str:
    return re.sub(r"(?<![\w.])/(?:[\w.@+-]+/)+", "…/", text)[-1000:]


def judge(entries: Entries, cases: tuple[Case, ...]) -> None:
    """Compare what is there with the targets; some compare cases with one another."""
    for one in cases:
        if one.name in entries:
            entries[one.name]["targets"] = [target.judge(entries[one.name], entries) for target in one.targets]


def table(entries: Entries) -> Table:
    """One row a case."""
    made = Table(title="decode and prefill against what this machine was measured to do")
    for name in ("case", "engine", "decode\ntok/s", "link\nGB/s", *SHARES, "prefill\ntok/s", *SHARES):
        made.add_column(name, justify="left" if name in ("case", "engine") else "right", no_wrap=True)
    for name in ("load\ns", "verified", "target", "met"):
        made.add_column(name, justify="right" if name == "load\ns" else "left")
    for name, entry in entries.items():
        group, _, engine = name.partition("/")
        metrics = entry["metrics"]
        if not metrics:
            reason = f"[red]{entry['status']}[/] {escape(str(entry['error']))}"
            made.add_row(group, engine, *[""] * 9, reason, "[red]no[/]")
            continue
        decode, prefill = metrics["decode_tok_per_s"], metrics["prefill_tok_per_s"]
        link, checked = metrics["link_bytes_per_s"], entry["verification"]
        shares = [_number(metrics[key], 3) for key in ("fraction_of_bound", "prefill_fraction_of_bound")]
        errors = [_percent(metrics.get(key)) for key in ("decode_prediction_error", "prefill_prediction_error")]
        figures = [_number(decode, 2), _number(link and link / 1e9, 1), shares[0], errors[0]]
        figures += [_number(prefill, 0), shares[1], errors[1]]
        verified = "yes" if checked and checked["passed"] else "no"
        made.add_row(group, engine, *figures, _number(metrics["load_s"], 1), verified, *_verdicts(entry["targets"]))
    return made


def _verdicts(targets: list[Entry]) -> tuple[str, str]:
    limits = [f"≥ {t['at_least']:g}" if "at_least" in t else f"≤ {t['at_most']:g}" for t in targets]
    lines = [f"{_number(t['achieved'], 3)} {t['what']} ({limit})" for t, limit in zip(targets, limits, strict=True)]
    words = {True: "[green]yes[/]", False: "[red]no[/]", None: "?"}
    return "\n".join(lines), "\n".join(words[target["met"]] for target in targets)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(error: float | None) -> str:
    return "–" if error is None else f"{100 * error:+.1f} %"


def load_entries(path: Path) -> Entries:
    """What an earlier job has left in the file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))["cases"]) if path.is_file() else {}


def save(path: Path, what: dict[str, str], entries: Entries, order: tuple[Case, ...]) -> None:
    """Write the file whole or not at all, in the order of the list."""
    judge(entries, order)
    known = [one.name for one in order if one.name in entries]
    ordered = {name: entries[name] for name in [*known, *(name for name in entries if name not in known)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    content = {**what, "cases": ordered}
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def choose(names: list[str], cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """The cases of these groups or names; all without any. Raises `ValueError` for a name that none has."""
    known = {name for one in cases for name in (one.group, one.name)}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no case is called {', '.join(unknown)}: pass --list to see them")
    return tuple(one for one in cases if not names or one.group in names or one.name in names)


class Bench(Protocol):
    """The device that cases run on."""

    what: dict[str, str]  # the JSON file says of it

    def measure(self, one: Case, disk: Path) -> dict[str, float]:
        """Ceilings for a case, which come before what its run knows. Machines are shared: measured right before it."""

    def drift(self, one: Case, disk: Path) -> float:
        """How much the machine has changed since, as a share."""


class Gpu:
    """The first GPU; its machine is measured anew before each run. Raises `LookupError` without one."""

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise LookupError("no GPU is visible: --list works without one, and --cpu has cases for such a machine")
        self.what = {"command": "make bench-gpu", "gpu": torch.cuda.get_device_name(0)}
        self._disk: float | None = None
        self._file_bytes = 0  # as many as the case reads: a smaller file may come from a cache

    def measure(self, one: Case, disk: Path) -> dict[str, float]:
        machine = _machine(one, None)
        if machine.calibration is None:
            raise SystemExit("without what the GPU can do there is nothing to compare with")
        self._file_bytes = _bytes_on_disk(one, machine) if one.on_disk else 0
        self._disk = self._read_rate(one, disk)
        rates = {name: getattr(machine.ceilings, name) for name in ("link_bytes_per_s", "flops", "hbm_bytes_per_s")}
        measured = {name: rate for name, rate in (rates | {"disk_bytes_per_s": self._disk}).items() if rate}
        shown = ", ".join(f"{name.split('_')[0]} {value:.4g}" for name, value in measured.items())
        print(f"  measured: {shown}", flush=True)
        return measured

    def drift(self, one: Case, disk: Path) -> float:
        """Of the disk alone: nobody else computes on the GPU."""
        now = self._read_rate(one, disk)
        return _change([(self._disk, now)] if self._disk and now else [])

    def _read_rate(self, one: Case, disk: Path) -> float | None:
        from published import compose

        from zi_experiments.calibration.disk import bytes_per_s
        from zi_experiments.engines import base

        if not one.on_disk:
            return None
        try:
            run = compose(one.overrides)
            there = base.get(run.engine.name).disk_access(run, [disk])
            return max(bytes_per_s(there, DISK_S, self._file_bytes)[0])
        except OSError as error:
            print(f"  the disk could not be measured: {error.strerror or error}", flush=True)
            return None


class Cpu:
    """The processor, all of whose rates are measured anew before each run and after it."""

    def __init__(self) -> None:
        self.what = {"command": "make bench-cpu"}
        self._before: list[float] = []

    def measure(self, one: Case, disk: Path) -> dict[str, float]:
        self._before = self._rates(one, disk)
        return {}  # the run finds them where they are kept

    def drift(self, one: Case, disk: Path) -> float:
        return _change(zip(self._before, self._rates(one, disk), strict=False))  # no disk where it cannot be measured

    def _rates(self, one: Case, disk: Path) -> list[float]:
        """Those on which most of a pass depends."""
        machine = _machine(one, disk if one.on_disk else None)
        if machine.calibration is None:
            return []  # it has said why
        curve = machine.calibration.gemm_flops[machine.dtypes[0]]  # of a slow processor it ends early
        products = [curve[min(rows, max(curve))] for rows in ROWS]
        read = machine.ceilings.disk_bytes_per_s
        return [*products, read] if one.on_disk and read else products


def _machine(one: Case, disk: Path | None) -> "Machine":
    """What a case runs on, measured anew, its disk too where a path is given. Without a calibration it has said why."""
    from published import compose

    from zi_experiments.calibration import suite
    from zi_experiments.engines import base
    from zi_experiments.system import machines

    run = compose(one.overrides)
    there = base.get(run.engine.name).disk_access(run, [disk]) if disk is not None else None
    gpus = run.hardware.num_gpus
    return suite.measure(run.hardware, machines.detect(run.hardware), there, _say, gpus)


def _bytes_on_disk(one: Case, machine: "Machine") -> int:
    """How many bytes of weights a case has there."""
    from published import compose, described

    from zi_experiments.planner import planning

    run = compose(one.overrides)
    return planning.build(run, described(run), machine).placement.nvme_bytes


def _change(pairs: Iterable[tuple[float, float]]) -> float:
    """The largest change of a rate, as a share."""
    return max((max(pair) / min(pair) - 1 for pair in pairs), default=0.0)


def _say(line: str) -> None:
    print(f"  {line}", flush=True)


def run_cases(
    chosen: tuple[Case, ...],
    entries: Entries,
    extra: list[str],
    timeout_s: float,
    bench: Bench,
    keep: Callable[[], None],
) -> None:
    """Run one case after the other into `entries`, and call `keep` after each."""
    (ROOT / "outputs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=ROOT / "outputs") as scratch:
        paths = [each.partition("=")[2] for each in extra if each.startswith("offload.path=")]
        disk = Path(paths[-1] if paths else scratch).expanduser()
        for number, one in enumerate(chosen, 1):
            print(f"{number}/{len(chosen)} {one.name}", flush=True)
            began = time.perf_counter()
            entries[one.name] = entry = steadiest(
                attempt(with_extra(one, extra), bench, disk, Path(scratch) / f"{number}-{turn}", timeout_s)
                for turn in range(TRIES)
            )
            keep()
            done = f"{_number(entry['metrics']['decode_tok_per_s'], 2)} tok/s" if entry["metrics"] else entry["error"]
            print(f"  {entry['status']} in {time.perf_counter() - began:.0f} s: {done}", flush=True)


def attempt(one: Case, bench: Bench, disk: Path, folder: Path, timeout_s: float) -> Entry:
    """Run a case, and say how much the machine has changed meanwhile."""
    measured = bench.measure(one, disk)
    typed = arguments(one, measured)
    record, output = execute(typed, folder, timeout_s)
    return to_entry(record, output, typed, measured) | {"drift": bench.drift(one, disk)}


def steadiest(tries: Iterable[Entry]) -> Entry:
    """The first try during which the machine was steady, or which failed; or else that during which it changed least."""
    made: list[Entry] = []
    for entry in tries:
        made.append(entry)
        if entry["drift"] <= STEADY or not entry["metrics"]:
            return entry
        print(f"  the machine has changed by {100 * entry['drift']:.0f} %", flush=True)
    return min(made, key=lambda entry: entry["drift"])


def _visible() -> int:
    from zi_experiments.system import machines

    return machines.gpu_count()


def _slug(gpu: str) -> str:
    return gpu.removeprefix("NVIDIA ").lower().replace(" ", "-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these groups or cases")
    parser.add_argument("--cpu", action="store_true", help="the cases for a machine without a GPU")
    parser.add_argument("--list", action="store_true", help="show the cases and what each runs")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="added to all commands")
    parser.add_argument("--output", type=Path, help="the JSON file; otherwise docs/results/bench-NAME.json")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="for one case")
    asked = parser.parse_args()
    cases = CPU_CASES if asked.cpu else (*CASES, *scaling(max(_visible(), 2 if asked.list else 1)))
    try:
        chosen = choose(asked.names, cases)
    except ValueError as error:
        parser.error(str(error))
    if asked.list:
        for one in chosen:
            print(f"{one.name:34} {' '.join(one.overrides)}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a time limit ends the case and shows the table
    try:
        bench = Cpu() if asked.cpu else Gpu()
    except LookupError as error:
        parser.error(str(error))
    path = asked.output or ROOT / "docs" / "results" / f"bench-{'cpu' if asked.cpu else _slug(bench.what['gpu'])}.json"
    entries = load_entries(path)
    try:
        run_cases(
            *(chosen, entries, asked.override, asked.timeout),
            bench=bench,
            keep=lambda: save(path, bench.what, entries, cases),
        )
    finally:
        console = Console()
        Console(width=None if console.is_terminal else 180).print(table(entries))
    ok = [entries[one.name]["status"] == "ok" for one in chosen]
    met = [target["met"] is True for one in chosen for target in entries[one.name]["targets"]]
    return 0 if all(ok + met) else 1


if __name__ == "__main__":
    sys.exit(main())
