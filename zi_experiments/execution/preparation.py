"""The one way from a configuration to a plan, for runs, for `plan_only=true` and for `get_ds_model`."""

from collections.abc import Callable
from pathlib import Path

from zi_experiments.calibration import this_machine
from zi_experiments.config.schema import Run
from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines import base
from zi_experiments.measurement import text
from zi_experiments.models import configuration, contents
from zi_experiments.models.architecture import Architecture
from zi_experiments.planner import planning, search
from zi_experiments.results import metrics


def check(run: Run) -> None:
    """Raise `ConfigError` for what is wrong with any model on any machine, before anything heavy is imported."""
    metrics.check(run)
    text.check(run.workload)
    base.check(run)
    configuration.check_path(run)


def prepare(
    run: Run, folders: list[Path], *, arch: Architecture | None = None, tell: Callable[[str], None] | None = None
) -> Plan | None:
    """Return the plan of a run on this machine; None: its search has no candidate of that rank.

    `folders` are for weights on disk. `arch` is the run's model, if it has been loaded. With `tell`, which gets a line
    before slow work, the machine is measured first if the search has to rank candidates, or if the host may compute.

    Raises `ConfigError` for a run that cannot work or does not fit.
    """
    arch = arch or contents.load(run)
    machine = this_machine.known(run, folders)
    on_host = run.offload.compute not in ("gpu", 0)
    if tell is not None and (run.search.rank is not None or on_host):
        machine = this_machine.measured(run, machine, folders, tell)
    settled = search.settle(run, arch, machine)
    if settled is None:
        return None
    if on_host:
        machine = this_machine.with_host(planning.on_gpu(settled, arch, machine), tell)
    return planning.build(settled, arch, machine)
