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
    """Print the measured candidates by number of sequences, with their predictions."""
    measured = [job for job in jobs if job[1]["metrics"]]
    most = max((_rate(job) for job in measured), default=0.0)
    table = Table(title="generated tokens per second, over prefill and decode")
    for name in ("sequences", "with", "predicted", "measured", ""):
        table.add_column(
            name, justify="right" if name in ("sequences", "predicted", "measured") else "left", overflow="fold"
        )
    for job in sorted(jobs, key=lambda job: (_sequences(job), -_rate(job))):
        record = job[1]
        predicted = record["plan"]["prediction"]["total_tok_per_s"] if record["plan"] else None
        table.add_row(
            str(_sequences(job) or ""),
            " ".join(_decided(record["config"]) if record["plan"] else job[0]),
            f"{predicted:,.1f}" if predicted else "",
            f"{_rate(job):,.1f}" if record["metrics"] else record["status"],
            Bar(size=most or 1, begin=0, end=_rate(job), width=_BAR_WIDTH),
        )
    console.print(table)


def show_commands(jobs: list[Job], console: Console) -> None:
    """Print the command of each candidate. The first job is the best."""
    for number, job in enumerate((job for job in jobs if job[1]["plan"]), 1):
        name = "best" if number == 1 else str(number)
        console.print(f"{name}: {_command(job)}", markup=False, highlight=False, soft_wrap=True)


def _sequences(job: Job) -> int:
    return job[1]["plan"]["sequences"] if job[1]["plan"] else 0


def _rate(job: Job) -> float:
    return float(job[1]["metrics"]["total_tok_per_s"]) if job[1]["metrics"] else 0.0


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
    """Return the command that runs the candidate alone: what was typed, with what the search has decided."""
    overrides, record = job
    decided = _decided(record["config"])
    replaced = {"search.rank", "plan_only", *(each.partition("=")[0] for each in decided)}
    kept = [each for each in overrides if each.partition("=")[0] not in replaced]
    folder = typed(shlex.split(record["run"]["command"])).config_dir
    own = ["--config-dir", folder] if folder else []  # with the user's own choices
    return f"python -m zi_experiments {shlex.join([*own, *kept, *decided, 'hydra.mode=RUN'])}"
