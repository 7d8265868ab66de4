"""Published throughputs against the bounds of the machines they were measured on: docs/published.md from conf/published/.

python benchmarks/published.py
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import hydra
from omegaconf import OmegaConf

from zi_experiments.config import published, resolvers, schema
from zi_experiments.config.composition import to_run
from zi_experiments.config.schema import Hardware, Run
from zi_experiments.cost_model.bound import lower_bound
from zi_experiments.cost_model.machine_bound import machine_bound_s, machine_prefill_s
from zi_experiments.cost_model.plan import Plan
from zi_experiments.models import description
from zi_experiments.models.architecture import Architecture
from zi_experiments.planner import planning
from zi_experiments.system.machines import GIB, Machine

PAGE = Path(__file__).resolve().parents[1] / "docs" / "published.md"
HEADER = """# Published figures, and what their machines could do

Written by `make test ARGS="-n 0 tests/docs/test_published.py --update-golden"` from
[`conf/published/`](../conf/published), and compared with it by every `make test`.

Each row is a throughput that somebody has published, and the bound of the same model, placement and batch on that machine,
from the plan that every run makes and the rates that vendors publish. B sequences of G new tokens are divided by prefill and
decode, or by decode alone, as the publication has it. No run of that placement can pass its bound: the ratio says what was
left to gain without another placement, and one above 1 would mean that a row is wrong.

† Keys and values do not have to cross the link in 16 bits: attention is computed where they are, or they have 4 bits. The
bound leaves them out: it is that of a GPU with room for them, which is never slower.

Where weights come from a disk whose rate was not published, there is no bound.

The last column is the share of what that machine could do with these weights in any placement, with any part of them
[computed by the host's cores](limits.md#the-bound-of-the-machine), which are taken to compute as fast as the GPU at most. It
needs the rate of the host's memory, of which the vendor's peak is taken where the processor is known, and keys and values of
16 bits.
"""
FORMULAS = {"total_tok_per_s": "B·G / (prefill + (G − 1) · step)", "decode_tok_per_s": "B / step"}
NOT_COUNTED = "1000"  # GiB of a GPU with room for a KV cache that need not cross the link in 16 bits
LIMITS = {"link": "link", "disk": "disk", "hbm": "GPU memory", "gemm": "arithmetic", None: "–"}
COLUMNS = (
    "#",
    "system",
    "model",
    "weights",
    "keys and values",
    "batch",
    "tok/s",
    "bound",
    "of the bound",
    "limited by",
    "of the machine",
)

_DESCRIBED: dict[str, Architecture] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A published figure, and what to type for its plan after `python -m zi_experiments`."""

    number: int
    system: str
    value: float
    sequences: int
    figure: str  # "total_tok_per_s" or "decode_tok_per_s"
    kv: str | None  # where keys and values were that do not count; None: on the GPU
    note: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    title: str
    machine: str
    source: str
    about: str
    figure: str
    rows: tuple[Row, ...]


def tables(listed: list[dict[str, Any]]) -> list[Table]:
    """The tables of the YAML files, the rows numbered throughout."""
    made, number = [], 0
    for one in listed:
        rows = [_row(row, one["figure"], number + n) for n, row in enumerate(published.rows(one), 1)]
        number += len(rows)
        made.append(
            Table(**{key: one[key] for key in ("title", "machine", "source", "about", "figure")}, rows=tuple(rows))
        )
    return made


def _row(row: published.Row, figure: str, number: int) -> Row:
    settings = {"plan_only": "true"} | row.settings
    settings.setdefault("workload.batch_size", str(row.batch))
    if row.kv:
        settings["hardware.memory_gib"] = NOT_COUNTED
    return Row(
        number=number,
        system=row.system,
        value=row.value,
        sequences=row.batch,
        figure=figure,
        kv=row.kv,
        note=row.note,
        overrides=tuple(f"{key}={value}" for key, value in settings.items()),
    )


def load() -> list[Table]:
    """The tables of `conf/published/`."""
    files = sorted((schema.conf_dir() / "published").glob("*.yaml"), reverse=True)
    return tables([cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path))) for path in files])


def compose(overrides: tuple[str, ...]) -> Run:
    """The run that a command line gives."""
    resolvers.register()
    with hydra.initialize_config_dir(config_dir=str(schema.conf_dir()), version_base="1.3"):
        return to_run(hydra.compose("config", overrides=list(overrides)))


@cache
def plan_of(row: Row) -> Plan:
    """The plan of a row on the machine of its hardware file, whatever machine this is."""
    run = compose(row.overrides)
    plan = planning.build(run, described(run), described_machine(run.hardware))
    assert plan.run.workload.sequences == row.sequences
    return plan


def described(run: Run) -> Architecture:
    """The architecture of a run; each model is built once."""
    key = repr((run.model, run.weights))
    if key not in _DESCRIBED:
        _DESCRIBED[key] = description.load(run)
    return _DESCRIBED[key]


def described_machine(hardware: Hardware) -> Machine:
    """A machine of which nothing is known but what its file and the row say."""
    assert hardware.memory_gib is not None
    assert hardware.host_memory_gib is not None
    assert hardware.dtypes is not None
    return Machine(
        device=hardware.device.value,
        gpu_name=hardware.gpu,
        gpus_visible=hardware.num_gpus,
        gpu_memory_bytes=int(hardware.memory_gib * GIB),
        gpu_memory_is_capped=False,
        host_memory_bytes=int(hardware.host_memory_gib * GIB),
        disk_free_bytes=None,
        dtypes=tuple(hardware.dtypes),
        ceilings=hardware.ceilings,
        calibration=None,
        peer_bytes_per_s=hardware.peer_bytes_per_s,
        driver=None,
    )


def bound_tok_per_s(sequences: int, gen_len: int, prefill_s: float, step_s: float, figure: str) -> float:
    """The most tokens per second, as a publication defines them."""
    seconds = {"total_tok_per_s": prefill_s + (gen_len - 1) * step_s, "decode_tok_per_s": gen_len * step_s}
    return sequences * gen_len / seconds[figure]


def bound_of(row: Row, plan: Plan) -> float | None:
    """The bound of a row's plan in its publication's terms; None where the rate of its disk is not known."""
    bound, work = lower_bound(plan), plan.run.workload
    if bound.prefill_s is None or bound.decode_step_s is None:
        assert bound.unknown == ("disk_bytes_per_s",)
        return None
    return bound_tok_per_s(work.sequences, work.gen_len, bound.prefill_s, bound.decode_step_s, row.figure)


def machine_bound_of(row: Row, plan: Plan) -> float | None:
    """The same over all placements on the machine; None where a rate is not known, or where the KV cache has 4 bits."""
    if row.kv and "4 bits" in row.kv:
        return None
    if row.kv:  # here they count
        file: Any = OmegaConf.load(schema.conf_dir() / "hardware" / f"{plan.run.hardware.name}.yaml")
        plan = replace(plan, machine=replace(plan.machine, gpu_memory_bytes=int(file.memory_gib * GIB)))
    prefill_s, step_s, work = machine_prefill_s(plan), machine_bound_s(plan), plan.run.workload
    if prefill_s is None or step_s is None:
        return None
    return bound_tok_per_s(work.sequences, work.gen_len, prefill_s, step_s, row.figure)


def page(listed: list[Table]) -> str:
    """The page: a table for each publication, and below it what to type for each of its rows."""
    return HEADER + "".join(_section(each) for each in listed)


def _section(table: Table) -> str:
    heading = f"\n## {table.title}\n\n{table.machine}. [Source]({table.source}).\n\n{table.about}\n"
    rules = "|".join(["---"] * len(COLUMNS))
    lines = "".join(_line(row, plan_of(row)) for row in table.rows)
    typed = "".join(f"python -m zi_experiments {' '.join(row.overrides)}  # {row.number}\n" for row in table.rows)
    shown = f"<details><summary>What to type for the plans</summary>\n\n```console\n{typed}```\n\n</details>\n"
    formula = FORMULAS[table.figure]
    return f"{heading}\nBound: `{formula}`.\n\n| {' | '.join(COLUMNS)} |\n|{rules}|\n{lines}\n{shown}"


def _line(row: Row, plan: Plan) -> str:
    run, bound, most, machine = plan.run, lower_bound(plan), bound_of(row, plan), machine_bound_of(row, plan)
    held = {"none": "GPU", "cpu": "host", "nvme": "NVMe"}[run.offload.device.value]
    bits = f"INT{run.quant.bits}" if run.quant.is_quantized else "16 bits"
    limits = [LIMITS[bound.limited_by]]
    if row.figure == "total_tok_per_s" and bound.prefill_limited_by != bound.limited_by:
        limits = [f"prefill {LIMITS[bound.prefill_limited_by]}", f"decode {limits[0]}"]
    cells = (
        *(row.number, row.system, run.model.name, f"{held}, {bits}" + (f"; {row.note}" if row.note else "")),
        *(f"{row.kv} †" if row.kv else "GPU", row.sequences, f"{row.value:g}"),
        *((f"{most:.3g}", f"{row.value / most:.2f}", ", ".join(limits)) if most else "–––"),
        f"{row.value / machine:.2g}" if machine else "–",
    )
    return f"| {' | '.join(map(str, cells))} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(load()), encoding="utf-8")
