"""The machine of a run: detected hardware, its measured rates, and the free disk space for weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from zi_experiments.calibration import suite
from zi_experiments.config.schema import OffloadDevice, Run
from zi_experiments.cost_model.plan import Plan
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
    return suite.known(run.hardware, machine, _disk(run, folders), _gpus(run))


def measured(run: Run, machine: Machine, folders: list[Path], tell: Callable[[str], None]) -> Machine:
    """Return `machine` with its rates, measuring those that are not cached; `tell` gets a line for what takes time."""
    return suite.ensure(run.hardware, machine, _disk(run, folders), tell, _gpus(run))


def measured_again(run: Run, machine: Machine, folders: list[Path], tell: Callable[[str], None]) -> Machine:
    """Return `machine` with its rates measured again, after a run that beat its bound."""
    return suite.again(run.hardware, machine, _disk(run, folders), tell, _gpus(run))


def with_host(plan: Plan, tell: Callable[[str], None] | None) -> Machine:
    """Return a plan's machine with how fast its cores compute the experts or the decoder layers of the plan.

    With `tell`, it is measured if it is not cached.
    """
    run, machine, stored = plan.run, plan.machine, plan.storage
    if run.hardware.name not in machines.HERE or not (stored.can_compute_on_host or stored.can_compute_experts_on_host):
        return machine
    work: dict[str, Any] = {
        "dtype": plan.dtype,
        "group_size": run.quant.group_size,  # of INT4 weights
        "threads": machines.cpu_threads(run.hardware, machine),
        "cores": list(machine.cores),
    }
    if stored.can_compute_experts_on_host:
        stacks = [p for p in plan.architecture.parameters if p.is_experts and p.experts]
        sequences = run.workload.sequences
        work |= {
            "shapes": [list(p.shape[1:]) for p in stacks if p.layer == stacks[0].layer],
            "transposed": not stacks[0].is_linear,
            "rows": max(1, round(sequences * plan.routed_experts / plan.distinct_experts(sequences))),
        }
        return suite.with_host(machine, "host-experts", work, tell)
    work |= {
        "config": plan.architecture.config.to_dict(),
        "rows": run.workload.batch_size,
        "tokens": run.workload.prompt_len + run.workload.gen_len // 2,
    }
    return suite.with_host(machine, "host-layer", work, tell)


def _gpus(run: Run) -> int:
    """Return how many GPUs of this machine a run uses."""
    return run.hardware.num_gpus // run.launch.nnodes


def _disk(run: Run, folders: list[Path]) -> disk.Disk | None:
    return base.get(run.engine.name).disk_access(run, folders) if run.offload.device is OffloadDevice.nvme else None
