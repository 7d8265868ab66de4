"""Output of a search for the best throughput: all candidates, and the command of the best one."""

import shlex
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from zi_experiments.config.schema import typed
from zi_experiments.engines import base

Job = tuple[list[str], dict[str, Any]]  # the overrides of a run, and its record

_BAR_WIDTH = 20


def is_search(jobs: list[Job]) -> bool:
    return any(_is_candidate(record["config"].get("search")) for _, record in jobs)


def _is_candidate(search: Any) -> bool:
    return isinstance(search, dict) and search.get("rank") is not None  # in a refused run it may be anything


def show_search(jobs: list[Job], console: Console) -> None:
    """Print the measured candidates by number of sequences, with their predictions, and the command of the best one."""
    measured = [job for job in jobs if job[1]["metrics"]]
    if not measured:
        return
    measured.sort(key=lambda job: (job[1]["plan"]["sequences"], -_rate(job)))
    best = max(measured, key=_rate)
    table = Table(title="generated tokens per second, over prefill and decode")
    for name in ("sequences", "with", "predicted", "measured", ""):
        table.add_column(
            name, justify="right" if name in ("sequences", "predicted", "measured") else "left", overflow="fold"
        )
    for job in measured:
        predicted = job[1]["plan"]["prediction"]["total_tok_per_s"]
        table.add_row(
            str(job[1]["plan"]["sequences"]),
            " ".join(_decided(job[1]["config"])),
            f"{predicted:,.1f}" if predicted else "",
            f"{_rate(job):,.1f}",
            Bar(size=_rate(best), begin=0, end=_rate(job), width=_BAR_WIDTH),
        )
    console.print(table)
    console.print(f"best: {_command(best)}", markup=False, highlight=False, soft_wrap=True)


def _rate(job: Job) -> float:
    return float(job[1]["metrics"]["total_tok_per_s"])


def _decided(config: dict[str, Any]) -> list[str]:
    """Return the overrides that define a candidate."""
    work = config["workload"]
    overrides = [f"workload.batch_size={work['batch_size']}", f"kv_cache={config['kv_cache']['device']}"]
    if "workload.micro_batches" in base.get(config["engine"]["name"]).OPTIONS:
        overrides.append(f"workload.micro_batches={work['micro_batches']}")
    if config["offload"]["resident"] != 0:
        overrides.append(f"offload.resident={config['offload']['resident']}")
    return overrides


def _command(job: Job) -> str:
    """Return the command that runs the candidate alone."""
    overrides, record = job
    kept = [each for each in overrides if not each.startswith(("search.rank=", "experiment=best-throughput"))]
    decided = _decided(record["config"])
    keys = {each.partition("=")[0] for each in decided}
    kept = [each for each in kept if each.partition("=")[0] not in keys]
    if not any(each.startswith("workload=") for each in kept):
        kept.insert(0, "workload=zero-inference")  # the default of the experiment
    folder = typed(shlex.split(record["run"]["command"])).config_dir
    own = ["--config-dir", folder] if folder else []  # with the user's own choices
    return f"python -m zi_experiments {shlex.join([*own, *kept, *decided])}"
