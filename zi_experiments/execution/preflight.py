"""Checks of a plan against this machine, before loading: one clear error instead of an obscure failure."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from zi_experiments.config.schema import ConfigError
from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines import base
from zi_experiments.measurement import perplexity, prompts
from zi_experiments.system import toolchain
from zi_experiments.system.machines import is_elsewhere


def check(plan: Plan, scratch: Sequence[Path], workers: int | None = None) -> None:
    """Refuse a plan that cannot work on this machine. `scratch` has the folders for NVMe offload, `workers` are those of
    this launcher where there are several: one such as srun may show it their GPUs only.

    Raises `ConfigError`, which says what is wrong and what to type.
    """
    for problem in _problems(plan, scratch, workers):
        raise ConfigError(problem)
    check_texts(plan)


def check_texts(plan: Plan) -> None:
    """Raise `ConfigError` for texts that the checkpoint's tokenizer cannot read, or that are too short."""
    if plan.run.workload.text is not None:
        perplexity.windows(plan)
    if plan.run.workload.prompts is not None:
        prompts.from_text(plan)


def _problems(plan: Plan, scratch: Sequence[Path], workers: int | None) -> Iterator[str]:
    yield from _devices(plan, workers)
    for folder in scratch:
        yield from _disk(folder)
    yield from base.get(plan.run.engine.name).requirements(plan)


def _devices(plan: Plan, workers: int | None) -> Iterator[str]:
    hardware, machine = plan.run.hardware, plan.machine
    if machine.device == "cpu":
        return
    if machine.gpus_visible == 0:
        yield f"hardware={hardware.name} needs a CUDA GPU and none is visible: pass hardware=auto, or plan_only=true"
    on_each = hardware.num_gpus // plan.run.launch.nnodes
    if on_each > machine.gpus_visible and machine.gpus_visible != workers:
        yield (
            f"hardware.num_gpus={hardware.num_gpus} and {machine.gpus_visible} are visible: "
            f"pass hardware.num_gpus={machine.gpus_visible * plan.run.launch.nnodes}"
        )
    if is_elsewhere(hardware, machine.gpu_name):
        yield (
            f"hardware={hardware.name} and this machine has {machine.gpu_name}: pass hardware=auto, "
            f"or hardware=auto hardware.memory_gib={hardware.memory_gib} to study a smaller card"
        )


def _disk(folder: Path) -> Iterator[str]:
    for look in (toolchain.writable, toolchain.direct_io):
        finding = look(folder.parent)
        if finding.fix is not None:
            yield f"offload.path={finding.found}: {finding.fix}"
