"""The machine of a run: detected hardware, its measured rates, and the free disk space for weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from zi_experiments.calibration import suite
from zi_experiments.config.schema import OffloadDevice, Run
from zi_experiments.engines import base
from zi_experiments.runtime import scratch
from zi_experiments.system import disk, machines
from zi_experiments.system.machines import Machine


def known(run: Run, folders: list[Path]) -> Machine:
    """Return the machine with cached rates, and with the free disk space in the folders for weights.

    Raises `ConfigError` if `offload.path` does not exist.
    """
    machine = machines.detect(run.hardware)
    # the disks of another machine are unknown
    is_here = not machines.is_elsewhere(run.hardware, machine.gpu_name)
    if is_here:
        scratch.check_bases("offload.path", run.offload.folders)
    machine = replace(machine, disk_free_bytes=disk.free_bytes(folders) if is_here else None)
    return suite.known(run.hardware, machine, _disk(run, folders))


def measured(run: Run, machine: Machine, folders: list[Path], tell: Callable[[str], None]) -> Machine:
    """Return `machine` with its rates, measuring those that are not cached; `tell` gets a line for what takes time."""
    return suite.ensure(run.hardware, machine, _disk(run, folders), tell)


def measured_again(run: Run, machine: Machine, folders: list[Path], tell: Callable[[str], None]) -> Machine:
    """Return `machine` with its rates measured again, after a run that beat its bound."""
    return suite.again(run.hardware, machine, _disk(run, folders), tell)


def _disk(run: Run, folders: list[Path]) -> disk.Disk | None:
    return base.get(run.engine.name).disk_access(run, folders) if run.offload.device is OffloadDevice.nvme else None
