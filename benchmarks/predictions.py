"""Predictions against measurements: docs/predictions.md from the benchmarks in docs/results.

python benchmarks/predictions.py [--output FILE]
"""

import argparse
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache, reduce
from pathlib import Path
from statistics import median
from typing import Any

from published import LIMITS, compose, described

from zi_experiments.config.schema import Calibration, Ceilings
from zi_experiments.cost_model.plan import Plan
from zi_experiments.cost_model.prediction import Prediction, predict
from zi_experiments.engines.base import Routed
from zi_experiments.planner import planning
from zi_experiments.results.metrics import with_counts
from zi_experiments.system.machines import Machine

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "predictions.md"
RESULTS = tuple(DOCS / "results" / f"bench-{name}.json" for name in ("h200", "h100-80gb-hbm3", "cpu"))
ELSEWHERE = ("-m", "tracking=", "offload.path=", "hardware.ceilings.")  # what a plan does not depend on, or has already
NAMES = [field.name for field in fields(Calibration)]  # older records lack what was not measured then
HEADER = """# Predictions against measurements

Written by `make test ARGS="-n 0 tests/docs/test_predictions.py --update-golden"`, and compared with the code by every
`make test`.

Each row is a case of `make bench-gpu` or `make bench-cpu` ([`docs/results`](results)), with what its plan predicts
before anything is loaded ([limits.md](limits.md) has the formulas). The predictions are made from the rates that
`hardware=auto` had measured on the machine; with a GPU, PCIe (here called the link) and disk were measured right before
the case. Of [routed experts](experts.md) a prediction is given how many were copied: what a step brings depends on the prompt.

Some of a machine is shared with others: the disk, and with a processor everything. It is measured before each run and
after it. Of up to three runs the first counts during which disk and products have changed by less than 15 %, or else
the one with the least change. An error is the prediction over the measured median, minus 1.

The H200 is part of a virtual machine on a host that others compute on as well, and its cores change their pace:
`layer_s` was measured from 0.18 to 0.50 ms there. Engines that wait for a core feel it: `accelerate`, whose copies from
pageable memory a core makes, and the reference profile of `deepspeed` in INT4, whose launches take longer than its
copies. One prefill of each of those two runs was measured.
"""
COLUMNS = (
    *("model", "engine", "weights", "prompts", "besides"),
    *("prefill s", "predicted", "error", "mostly", "step s", "predicted", "error", "mostly", "load s", "predicted"),
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """A run, and the machine that it was planned for."""

    command: str
    machine: Machine
    processor: str
    prefill_s: float
    step_s: float
    load_s: float
    routed: Routed | None  # what the decode steps did, if they bring routed experts only
    steps: int

    @property
    def on(self) -> str:
        return self.machine.gpu_name or self.processor


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A measured run, its plan, and what that predicts."""

    measured: Measured
    plan: Plan
    prediction: Prediction

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
    """The cases of a benchmark's file that have figures, and a machine that was measured."""
    for case in found["cases"].values():
        if case["metrics"] is not None and case["plan"]["rates"]["calibration"] is not None:
            yield Measured(
                command=case["command"],
                machine=machine_of(case),
                processor=f"{case['environment']['cpu']}, {case['environment']['cpu_cores']} cores",
                prefill_s=case["metrics"]["ttft_s"],
                step_s=case["metrics"]["tpot_p50_s"],
                load_s=case["metrics"]["load_s"],
                routed=routed(case),
                steps=sum(map(len, case["samples"]["step_s"])),
            )


def routed(case: dict[str, Any]) -> Routed | None:
    """The counts of all measured passes of a case together."""
    found = [Routed(**each) for each in case["samples"].get("routed", []) if each]  # older records have none
    return reduce(Routed.plus, found) if found else None


def machine_of(case: dict[str, Any]) -> Machine:
    """The machine as the plan of a case had it."""
    plan, around = case["plan"], case["environment"]
    memory = {use["where"]: use["available"] for use in plan["memory"]}
    rates = dict(plan["rates"])
    measured, peer = rates.pop("calibration"), rates.pop("peer_bytes_per_s", None)
    products = {
        kind: {int(rows): rate for rows, rate in curve.items()} for kind, curve in measured["gemm_flops"].items()
    }
    return Machine(
        device=plan["device"],
        gpu_name=around["gpu"],
        gpus_visible=1,
        gpu_memory_bytes=memory.get("GPU"),
        gpu_memory_is_capped="hardware.memory_gib=" in case["command"],
        host_memory_bytes=memory["host"],
        disk_free_bytes=memory.get("disk"),
        dtypes=(plan["dtype"],),
        ceilings=Ceilings(**{**dict.fromkeys(Ceilings.__dataclass_fields__), **rates}),
        calibration=Calibration(**{**dict.fromkeys(NAMES), **measured, "gemm_flops": products}),
        driver=around["driver"],
        peer_bytes_per_s=peer,
    )


@cache
def compare(measured: Measured) -> Compared:
    """The plan that the code makes of the command today, and its prediction, given the experts that were copied."""
    typed = [each for each in shlex.split(measured.command)[3:] if not each.startswith(ELSEWHERE)]
    run = compose(tuple(typed))
    plan = planning.build(run, described(run), measured.machine)
    counted = with_counts(plan, measured.routed, measured.steps)
    return Compared(measured=measured, plan=plan, prediction=predict(counted))


def page(found: list[Measured]) -> str:
    """A table for each machine, and the median and the worst error below it."""
    made = HEADER
    for machine in dict.fromkeys(each.on for each in found):
        compared = [compare(each) for each in found if each.on == machine]
        prefill, steps = [each.prefill_error for each in compared], [each.step_error for each in compared]
        made += f"\n## {machine}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
        made += "".join(map(_line, compared))
        within = 0.1 if compared[0].measured.machine.device == "cuda" else 0.25
        made += (
            f"\nErrors without their signs: prefill {_spread(prefill)}; decode {_spread(steps)}. "
            f"Of {len(compared)} runs {_close(prefill, within)} have their prefill predicted within "
            f"{100 * within:.0f} %, and {_close(steps, within)} their decode step.\n"
        )
    return made


def _spread(errors: list[float]) -> str:
    sizes = [abs(each) for each in errors]
    return f"median {100 * median(sizes):.1f} %, worst {100 * max(sizes):.1f} %"


def _close(errors: list[float], within: float) -> int:
    return sum(abs(each) <= within for each in errors)


def _line(one: Compared) -> str:
    run, found, seen = one.plan.run, one.prediction, one.measured
    engine = run.engine.name + (f" {run.engine.profile.value}" if run.engine.profile else "")
    assert found.prefill_s is not None
    assert found.decode_step_s is not None
    cells = (
        *(run.model.name, engine, f"{run.offload.name} {run.quant.name}"),
        *(f"{run.workload.sequences} × {run.workload.prompt_len}", _besides(one.plan)),
        *(f"{seen.prefill_s:.3f}", f"{found.prefill_s:.3f}", f"{100 * one.prefill_error:+.1f} %"),
        *(_mostly(found.prefill_limited_by), f"{seen.step_s:.4f}", f"{found.decode_step_s:.4f}"),
        *(f"{100 * one.step_error:+.1f} %", _mostly(found.limited_by), f"{seen.load_s:.1f}", f"{found.load_s:.1f}"),
    )
    return f"| {' | '.join(cells)} |\n"


def _besides(plan: Plan) -> str:
    """What of a run is not in its choices of model, engine, offload and quantization."""
    run = plan.run
    told = {
        f"{run.workload.micro_batches} micro-batches": run.workload.micro_batches > 1,
        "KV cache in host memory": run.kv_cache.device.value == "cpu",
        f"at most {run.hardware.memory_gib} GiB": run.hardware.memory_gib is not None,
        f"resident {run.offload.resident}": run.offload.resident != 0,
        f"{len(plan.storage.host_layers)} layers on the host": plan.storage.host_layers,
    }
    return ", ".join(text for text, holds in told.items() if holds)


def _mostly(name: str | None) -> str:
    return {**LIMITS, "launch": "launches", "hbm": "memory", "host": "cores", "memory": "host memory"}[name]


@cache
def load() -> list[Measured]:
    """All runs in docs/results that are compared."""
    return [each for path in RESULTS for each in runs(json.loads(path.read_text(encoding="utf-8")))]


def write(usage: str | None, default: Path, text: Callable[[], str]) -> None:
    """Write a page to the file of the command line."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=default, metavar="FILE")
    asked = parser.parse_args()
    asked.output.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    write(__doc__, PAGE, lambda: page(load()))
