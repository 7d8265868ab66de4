"""Hydra's entry point."""

import gc
import shlex
import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from zi_experiments import environment, lines
from zi_experiments.config import errors, resolvers, schema
from zi_experiments.execution import joining, sweep
from zi_experiments.runtime import signals, stdio

# What torch and transformers make when they are imported stays: with Python's own 700 a fifth of a command's time goes
# into looking through it.
_GC_THRESHOLD = 10_000


def main() -> None:
    """Compose the configuration from the command line and carry it out, once or as a sweep."""
    code: Any = None
    try:
        _main()
    except SystemExit as end:
        code = end.code
        raise
    finally:
        joining.leave(code)


def _main() -> None:
    gc.set_threshold(_GC_THRESHOLD)
    stdio.install()
    try:
        sys.argv[1:] = joining.take_launcher(sys.argv[1:])
    except ValueError as error:
        sys.exit(lines.fit(f"refused: {error}", sys.stderr))
    resolvers.register()
    signals.install(before=sweep.stop_jobs)
    environment.set_variables({"HYDRA_FULL_ERROR": "1"})  # it raises what it cannot compose, and prints no traceback
    if problem := errors.of_flags(sys.argv[1:]):
        sys.exit(lines.fit(f"refused: {problem}", sys.stderr))
    composed = list[DictConfig]()

    def run(cfg: DictConfig) -> None:
        composed.append(cfg)
        _run(cfg)

    entry = hydra.main(version_base="1.3", config_path=str(schema.conf_dir()), config_name="config")(run)
    try:
        entry()
    except KeyboardInterrupt:
        signals.acknowledge()
        if line := sweep.what_goes_on():
            print(lines.fit(line, sys.stderr), file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        is_under_way = bool(composed or sweep.told())
        if is_under_way and not isinstance(error, CompactHydraException | OmegaConfBaseException):
            raise
        sys.exit(lines.fit(f"refused: {errors.of_error(error, sys.argv[1:])}", sys.stderr))
    finally:
        if jobs := sweep.told():
            _report(jobs)
        gc.freeze()  # the end of the process has nothing to look for either
    if sweep.has_failed():
        sys.exit(1)  # what was wrong with a run has been said


def _report(jobs: list[sweep.Job]) -> None:
    """Print what the runs of a sweep say together: plans, an answer, or their figures; and the commands of a search."""
    from rich.console import Console

    from zi_experiments.report import answer_table, answers, plan_list, runs
    from zi_experiments.report.comparison import number
    from zi_experiments.results.sinks.console import show_sweep
    from zi_experiments.results.sinks.search_commands import is_search, show_commands

    console = Console()
    folder = sweep.output()
    carried_out = [(overrides, record) for overrides, record in jobs if record["status"] != "skipped"]
    told = [runs.from_record(record, str(folder / "run" / "result.json")) for _, record in carried_out]
    plans = [record["shown"] for _, record in carried_out if "shown" in record]
    if len(plans) == len(jobs) == 1:
        print(plans[0], end="")
    elif plans:
        plan_list.show(told, console)
    elif found := answers.of(told):
        for answer in found:
            answer_table.show(answer, console)
    else:
        show_sweep(jobs)
    if is_search(jobs):
        ranked = sorted(
            zip(told, carried_out, strict=True), key=lambda each: -(number(each[0], "total_tok_per_s") or 0)
        )
        show_commands([job for _, job in ranked], console)
    print(
        f"report: python -m zi_experiments.report {shlex.quote(str(folder))} --output {shlex.quote(str(folder / 'report'))}"
    )


def _run(cfg: DictConfig) -> None:
    from zi_experiments.results import initial  # what --help and --cfg do without
    from zi_experiments.run import RunFailed, run_job

    hydra_config = HydraConfig.get()
    if hydra_config.mode is RunMode.MULTIRUN:
        number, overrides = hydra_config.job.num, initial.overrides()
        if joining.follows(cfg):
            return
        try:
            run_job(cfg, keep=True, tell=lambda result: sweep.tell(number, overrides, result))
        except RunFailed:
            sweep.fail()  # an exception would have Hydra print the overrides, as if something were broken
        except KeyboardInterrupt as interrupt:
            sweep.requeue(str(interrupt))
            raise
        finally:
            if environment.runs_a_job_elsewhere():
                joining.leave(0)
        return
    try:
        run_job(cfg)
    except RunFailed:
        sys.exit(1)  # what was wrong has been said
