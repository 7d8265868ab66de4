"""`get_ds_model`: the reference script's function, for use in a process of one's own."""

import uuid
import weakref
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from zi_experiments import environment, lines
from zi_experiments.config.composition import from_choices
from zi_experiments.config.schema import ConfigError, Run, conf_dir
from zi_experiments.engines import base
from zi_experiments.execution import preflight
from zi_experiments.execution.preparation import check, prepare
from zi_experiments.runtime import caches, distributed, progress, scratch


def get_ds_model(
    model_name: str,
    cpu_offload: bool,
    disk_offload: bool,
    offload_dir: str,
    dummy_weights: str | None,
    bits: int,
    group_size: int,
    *,
    batch_size: int = 1,
    pin_memory: bool | None = None,
    use_gds: bool = False,
    profile: str = "tuned",
) -> Any:
    """Return a causal language model wrapped by DeepSpeed ZeRO stage 3, in eval mode, ready for `generate`.

    Args:
        model_name: hub name ("facebook/opt-66b"), folder, or the name of a shipped shape ("opt-66b").
        cpu_offload: keep the weights in host memory.
        disk_offload: keep them on disk, in a folder of their own under `offload_dir`; wins over `cpu_offload`.
        offload_dir: an existing folder; used with `disk_offload` only. What is written there is removed with the model
            or at the end of the process.
        dummy_weights: None for the checkpoint `model_name`, "random" for random weights of its shape, or the folder
            of another checkpoint.
        bits: 16, 8 or 4.
        group_size: number of weights that share a scale and a minimum; used below 16 bits.
        batch_size: sequences in a call of `generate`, over all ranks: a multiple of the number of ranks.
        pin_memory: pin weights in host memory; None pins them if there is room.
        use_gds: read from disk by GPUDirect Storage.
        profile: "tuned", or "reference" for the DeepSpeedExamples script's configuration, key for key.

    Without a launcher this process is the only rank; under torchrun the model is partitioned over its ranks. One model
    per process: DeepSpeed does not release everything.

    Raises:
        ConfigError: the model or a setting cannot work or fit on this machine; the message says what to pass.
    """
    if bits not in (16, 8, 4):
        raise ConfigError(f"bits={bits} is not supported: pass bits=4, 8 or 16")
    found, ranks = environment.launched(), distributed.launched_ranks()
    offload = "nvme" if disk_offload else "cpu" if cpu_offload else "none"
    settings: dict[str, Any] = {
        "engine.profile": profile,
        "hardware.num_gpus": ranks,
        "workload.batch_size": batch_size,
        "offload.use_gds": use_gds,
        "offload.path": offload_dir if disk_offload else None,
        "offload.pin_memory": None if offload == "none" else pin_memory,
    }
    if found and found.processes == ranks:
        settings |= {"launch.nnodes": found.machines, "launch.rdzv_endpoint": found.endpoint}
    if bits < 16:
        settings |= {"quant.group_size": group_size}
    if dummy_weights != "random":
        settings |= {"weights.path": dummy_weights or model_name}
    model = _known_model(model_name)
    if model == "local":
        settings |= {"model.path": model_name}
    choices = {
        "model": model,
        "offload": offload,
        "quant": f"int{bits}" if bits < 16 else "fp16",
        "weights": "random" if dummy_weights == "random" else "pretrained",
        "tracking": "none",
    }
    return _load(from_choices(choices, settings))


def _load(run: Run) -> Any:
    console = Console(stderr=True)
    if (line := caches.settle()) and not distributed.launched_rank():
        lines.say(line, console)
    check(run)
    scratch.check_bases("offload_dir", run.offload.folders)
    paths = scratch.for_weights(run, Path.cwd(), uuid.uuid4().hex[:12])
    scratch.remove_abandoned(*(path.parent for path in paths))
    planned = prepare(run, scratch.bases_for_weights(run, Path.cwd()))
    assert planned is not None, "nothing is searched here"
    preflight.check(planned, paths)
    environment.set_variables(environment.worker_environment(cuda=planned.machine.device == "cuda"))
    engine = base.get(run.engine.name)
    config = engine.config(planned, list(map(str, paths)))
    told = progress.silent() if distributed.launched_rank() else progress.shown(console)
    engine.prepare(planned, told)
    held = [scratch.Scratch(path) for path in paths]
    try:
        session = engine.load(planned, config, told)
    except BaseException:
        for each in held:
            each.close()
        raise
    # the destructor of the session's engine would remove the hooks that fetch the weights
    session.model.zi_session = session
    for each in held:
        weakref.finalize(session.model, each.close)
    return session.model


def _known_model(name: str) -> str:
    """Return the shipped shape with that name or hub name, else `local`."""
    for path in sorted((conf_dir() / "model").glob("*.yaml")):
        if path.stem != "local" and name in (path.stem, OmegaConf.load(path).path):
            return path.stem
    return "local"
