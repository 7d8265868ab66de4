"""Output of a search for the best throughput: the commands of its candidates."""

import shlex
from typing import Any

from rich.console import Console

from zi_experiments.config.command_line import typed
from zi_experiments.engines import base

Job = tuple[list[str], dict[str, Any]]  # the overrides of a run, and its record


def is_search(jobs: list[Job]) -> bool:
    return any(_is_candidate(record["config"].get("search")) for _, record in jobs)


def _is_candidate(search: Any) -> bool:
    return isinstance(search, dict) and search.get("rank") is not None  # in a refused run it may be anything


def show_commands(jobs: list[Job], console: Console) -> None:
    """Print the command of each candidate, of which the first job is the best."""
    for number, job in enumerate((job for job in jobs if job[1]["plan"]), 1):
        is_best = number == 1 and job[1]["status"] in ("ok", "kept", "predicted", "bound")
        name = "best" if is_best else str(number)
        console.print(f"{name}: {_command(job)}", markup=False, highlight=False, soft_wrap=True)


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
    replaced = {"search.rank", "plan_only", "kv_cache.device", *(each.partition("=")[0] for each in decided)}
    kept = [each for each in overrides if each.lstrip("+").partition("=")[0] not in replaced]
    folder = typed(shlex.split(record["run"]["command"])).config_dir
    own = ["--config-dir", folder] if folder else []  # with the user's own choices
    return f"python -m zi_experiments {shlex.join([*own, *kept, *decided, 'hydra.mode=RUN'])}"
