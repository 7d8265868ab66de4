"""The machine as it is for a run: what is here, what was measured of it, and what is free where weights go."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from zi_experiments.calibration import suite
from zi_experiments.config.schema import OffloadDevice, Run
from zi_experiments.engines import base
from zi_experiments.runtime import scratch
from zi_experiments.system import disk, machines
from zi_experiments.system.machines import Machine


def known(run: Run, folder: Path) -> Machine:
    """The machine with what was measured of it before, and with what is free in the folder for weights on disk.

    Raises `ConfigError` when that is to be a folder which is not there.
    """
    machine = machines.detect(run.hardware)
    # of another machine nobody knows that
    is_here = not machines.is_elsewhere(run.hardware, machine.gpu_name)
    if is_here:
        scratch.check_base("offload.path", run.offload.path)
    machine = replace(machine, disk_free_bytes=disk.free_bytes(folder) if is_here else None)
    return suite.known(run.hardware, machine, _disk(run, folder))


def measured(run: Run, machine: Machine, folder: Path, tell: Callable[[str], None]) -> Machine:
    """The machine with its rates, measured now if they are not known; `tell` gets a line for what takes time."""
    return suite.ensure(run.hardware, machine, _disk(run, folder), tell)


def measured_again(run: Run, machine: Machine, folder: Path, tell: Callable[[str], None]) -> Machine:
    """The machine with its rates measured anew, after a run that was faster than they allow."""
    return suite.again(run.hardware, machine, _disk(run, folder), tell)


def _disk(run: Run, folder: Path) -> disk.Disk | None:
    return base.get(run.engine.name).disk_access(run, folder) if run.offload.device is OffloadDevice.nvme else None
