"""Predictions against measurements: docs/predictions.md from the runs in docs/results and what was measured of their machine.

python benchmarks/predictions.py [--calibration FILE] [--output FILE]
"""

import argparse
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf
from published import LIMITS, compose, described_machine

from zi_experiments import architecture, planner, predict
from zi_experiments.config import Hardware, Run
from zi_experiments.hardware import Machine
from zi_experiments.plan import Plan

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, CALIBRATION = DOCS / "predictions.md", DOCS / "results" / "calibration-h200.yaml"
RESULTS = tuple(
    DOCS / "results" / name for name in ("bench-h200.json", "stream-more-h200.json", "opt-175b-cpu-h200.json")
)
ELSEWHERE = ("-m", "tracking=", "offload.path=", "hardware=", "hardware.ceilings.")  # what a plan does not depend on
HEADER = """# Predictions against measurements

Written by `make test ARGS="-n 0 tests/test_predictions.py --update-golden"`, and compared with the code by every `make test`.

Each row is a run on an {gpu}, and what its plan predicts before anything is loaded ([limits.md](limits.md) has the
formulas). The machine is the one that `python -m zi_experiments.hardware` has measured
([`{calibration}`](results/{calibration})), with the rates of link, memory, arithmetic and disk as measured in the run's own
job, where that was done. An error is the prediction over the measured median, minus 1.

| model | engine | weights | besides | prefill s | predicted | error | mostly | step s | predicted | error | mostly |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A run, and the ceilings that were measured in its job."""

    command: str
    ceilings: dict[str, float]
    prefill_s: float
    step_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A measured run, its plan, and what that predicts."""

    measured: Measured
    plan: Plan
    prediction: predict.Prediction

    @property
    def prefill_error(self) -> float:
        return error(self.prediction.prefill_s, self.measured.prefill_s)

    @property
    def step_error(self) -> float:
        return error(self.prediction.decode_step_s, self.measured.step_s)


def error(predicted: float | None, measured: float) -> float:
    """How much longer than measured, as a share of what was measured."""
    assert predicted is not None
    return predicted / measured - 1


def runs(found: dict[str, Any]) -> Iterator[Measured]:
    """The runs of a file that have figures: cases of `make bench-gpu`, or whole records."""
    for case in found.get("cases", {}).values():
        yield from _measured(case["command"], case["ceilings"], case["metrics"])
    for record in found.get("runs", []):
        ceilings = record["config"]["hardware"]["ceilings"]
        known = {name: rate for name, rate in ceilings.items() if isinstance(rate, float)}
        yield from _measured(record["run"]["command"], known, record["metrics"])


def _measured(command: str, ceilings: dict[str, float], metrics: dict[str, float] | None) -> Iterator[Measured]:
    if metrics is not None:
        times = {"prefill_s": metrics["ttft_s"], "step_s": metrics["tpot_p50_s"]}
        yield Measured(command=command, ceilings=ceilings, **times)


def load_hardware(path: Path) -> Hardware:
    """The `hardware` choice in a file."""
    hardware = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Hardware), OmegaConf.load(path)))
    assert isinstance(hardware, Hardware)
    return hardware


def machine_of(measured: Measured, run: Run, hardware: Hardware) -> Machine:
    """The machine as it was known to be, the rates of the run's own job laid over those of the file."""
    limited = run.hardware
    known = replace(
        hardware,
        memory_gib=limited.memory_gib or hardware.memory_gib,
        host_memory_gib=limited.host_memory_gib or hardware.host_memory_gib,
        ceilings=replace(hardware.ceilings, **measured.ceilings),
    )
    capped = limited.memory_gib is not None
    return replace(described_machine(known), gpu_memory_is_capped=capped, calibration=hardware.calibration)


def compare(measured: Measured, hardware: Hardware) -> Compared:
    """The plan that the code makes of the command today, and its prediction."""
    typed = [each for each in shlex.split(measured.command)[3:] if not each.startswith(ELSEWHERE)]
    run = compose(tuple(typed))
    plan = planner.build(run, architecture.load(run), machine_of(measured, run, hardware))
    return Compared(measured=measured, plan=plan, prediction=predict.predict(plan))


def page(hardware: Hardware, calibration: str, found: list[Measured]) -> str:
    """The table, and the median and the worst error below it."""
    compared = [compare(each, hardware) for each in found]
    prefill, steps = [each.prefill_error for each in compared], [each.step_error for each in compared]
    below = (
        f"\nErrors without their signs: prefill {_spread(prefill)}; decode {_spread(steps)}. "
        f"Of {len(compared)} runs {_close(prefill)} have their prefill predicted within 10 %, "
        f"and {_close(steps)} their decode step.\n"
    )
    header = HEADER.format(gpu=hardware.gpu, calibration=calibration)
    return header + "".join(map(_line, compared)) + below


def _spread(errors: list[float]) -> str:
    sizes = [abs(each) for each in errors]
    return f"median {100 * median(sizes):.1f} %, worst {100 * max(sizes):.1f} %"


def _close(errors: list[float]) -> int:
    return sum(abs(each) <= 0.1 for each in errors)


def _line(one: Compared) -> str:
    run, found, seen = one.plan.run, one.prediction, one.measured
    engine = run.engine.name + (f" {run.engine.profile.value}" if run.engine.profile else "")
    assert found.prefill_s is not None
    assert found.decode_step_s is not None
    cells = (
        *(run.model.name, engine, f"{run.offload.name} {run.quant.name}", _besides(one.plan)),
        *(f"{seen.prefill_s:.3f}", f"{found.prefill_s:.3f}", f"{100 * one.prefill_error:+.1f} %"),
        *(_mostly(found.prefill_limited_by), f"{seen.step_s:.4f}", f"{found.decode_step_s:.4f}"),
        *(f"{100 * one.step_error:+.1f} %", _mostly(found.limited_by)),
    )
    return f"| {' | '.join(cells)} |\n"


def _besides(plan: Plan) -> str:
    """What of a run is not in its choices of model, engine, offload and quantization."""
    run = plan.run
    told = {
        f"{run.workload.micro_batches} micro-batches": run.workload.micro_batches > 1,
        "keys and values in host memory": run.kv_cache.device.value == "cpu",
        f"at most {run.hardware.memory_gib} GiB": run.hardware.memory_gib is not None,
        f"resident {run.offload.resident}": run.offload.resident != 0,
    }
    return ", ".join(text for text, holds in told.items() if holds)


def _mostly(name: str | None) -> str:
    return {**LIMITS, "launch": "launches"}[name]


def load() -> list[Measured]:
    """All runs in docs/results that are compared."""
    return [each for path in RESULTS for each in runs(json.loads(path.read_text(encoding="utf-8")))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION, metavar="FILE", help="a hardware choice")
    parser.add_argument("--output", type=Path, default=PAGE, metavar="FILE")
    asked = parser.parse_args()
    if not asked.calibration.is_file():
        parser.error(
            f"{asked.calibration} is not there: python -m zi_experiments.hardware measures a machine and writes one"
        )
    written = page(load_hardware(asked.calibration), asked.calibration.name, load())
    asked.output.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
