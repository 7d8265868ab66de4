"""Validation of a run that needs neither model nor machine: single values, and values that exclude each other."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from math import inf
from pathlib import Path
from typing import Any

from zi_experiments.config import published
from zi_experiments.config.schema import ConfigError, DeviceType, OffloadDevice, Run, WeightSource

_ENDPOINT = re.compile(r"([^\s:]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}")  # a name, IPv4, or IPv6 in brackets


def validate(run: Run) -> None:
    """Raise `ConfigError` for the first invalid value, or pair of values that exclude each other."""
    for check in _CHECKS:
        if problem := check(run):
            raise ConfigError(problem)


def is_endpoint(text: str) -> bool:
    """Return whether a text is HOST:PORT."""
    return _ENDPOINT.fullmatch(text) is not None and int(text.rpartition(":")[2]) < 1 << 16


def _settings(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and value of every setting."""
    for field in fields(node):
        value = getattr(node, field.name)
        if is_dataclass(value):
            yield from _settings(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def _integers(run: Run) -> str | None:
    for key, value in _settings(run):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return f"{key} does not fit into 64 bits: pass {key}=… of at most 18 digits"
    return None


def _paths(run: Run) -> str | None:
    for key, value in _paths_of(run):
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            return f"{key}={value!r} is not a path: pass {key}=/a/path, or {key}=null"
        try:
            Path(value).expanduser()
        except RuntimeError:
            return f"{key}={value} begins with the home of an unknown user: pass {key}=/a/path"
    return None


def _paths_of(run: Run) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of every path that is set; those of a list one by one."""
    for key, value in _settings(run):
        if key.endswith((".path", ".text", ".prompts")) and value is not None:
            several = key == "offload.path" and isinstance(value, list) and value
            yield from ((key, each) for each in (several or [value]))


def _workload(run: Run) -> str | None:
    work, ranks, is_auto = run.workload, run.hardware.num_gpus, run.workload.batch_size == "auto"
    if not is_auto and (not isinstance(work.batch_size, int) or isinstance(work.batch_size, bool)):
        return (
            f"workload.batch_size={work.batch_size} is not a number of sequences: pass workload.batch_size=8, or auto"
        )
    for name in ("batch_size", "micro_batches", "prompt_len", "gen_len", "warmup", "repeats")[is_auto:]:
        least = 0 if name == "warmup" else 1
        if getattr(work, name) < least:
            return f"workload.{name} must be at least {least}, not {getattr(work, name)}: pass workload.{name}={least}"
    if ranks < 1:
        return f"hardware.num_gpus must be at least 1, not {ranks}: pass hardware.num_gpus=1"
    if is_auto or work.batch_size % ranks == 0:
        return None
    # ranks may have one sequence more or fewer, but not some of their micro-batches
    if work.batch_size < ranks or work.micro_batches > 1:
        below = max(ranks, work.batch_size // ranks * ranks)
        return (
            f"workload.batch_size={work.batch_size} cannot be divided among {ranks} ranks: "
            f"pass workload.batch_size={below} or {below + ranks}"
        )
    return None


def _texts(run: Run) -> str | None:
    work, is_random = run.workload, run.weights.source is WeightSource.random
    if work.text is not None and is_random:
        return (
            f"workload.text={work.text} asks for the perplexity of random weights, which means nothing: "
            "pass weights=pretrained, or workload.text=null"
        )
    if work.prompts is not None and is_random:
        return (
            f"workload.prompts={work.prompts} needs the tokenizer of a checkpoint: "
            "pass weights=pretrained, or workload.prompts=null"
        )
    if work.text is not None and work.prompt_len < 2:
        return "workload.prompt_len=1 leaves nothing of workload.text to predict: pass workload.prompt_len=512"
    if work.prompts is not None and work.prompt_len < 2:
        return "workload.prompt_len=1 may leave no room after BOS for workload.prompts: pass workload.prompt_len=512"
    return None


def _quant(run: Run) -> str | None:
    quant = run.quant
    if quant.is_native or not quant.is_quantized:
        if quant.group_size is not None or quant.group_dim is not None:
            kind = "the format of a checkpoint" if quant.is_native else "16-bit weights"
            return f"quant.group_size and quant.group_dim mean nothing for {kind}: pass quant=int4 or quant=int8"
        return None
    if quant.bits not in (4, 8):
        return f"quant.bits={quant.bits} is not supported: pass quant=int4, quant=int8 or quant=fp16"
    if quant.group_size is None or quant.group_size < 2:
        return f"quant.group_size={quant.group_size} is not a group size: pass quant.group_size=64"
    if quant.group_dim not in (0, 1):
        return f"quant.group_dim={quant.group_dim} is not a dimension of a weight: pass quant.group_dim=1 (or 0)"
    return None


def _is_share(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value <= 1


def _offload(run: Run) -> str | None:
    offload = run.offload
    if offload.device is not OffloadDevice.nvme:
        for key in ("path", "buffer_count", "buffer_size"):
            if getattr(offload, key) is not None:
                return f"offload.{key} is only used with offload=nvme, not offload={offload.device.value}: pass offload=nvme"
        if any(value is not None for value in vars(offload.aio).values()):
            return f"offload.aio is only used with offload=nvme, not offload={offload.device.value}: pass offload=nvme"
        if offload.use_gds:
            return "offload.use_gds=true is only used with offload=nvme: pass offload=nvme"
    if offload.resident != "auto" and not _is_share(offload.resident):
        return (
            f"offload.resident={offload.resident} is not a share: pass offload.resident=auto, or a number from 0 to 1"
        )
    if offload.compute not in ("gpu", "auto") and not _is_share(offload.compute):
        return (
            f"offload.compute={offload.compute} is not a share: pass offload.compute=auto, gpu, or a number from 0 to 1"
        )
    if offload.device is OffloadDevice.none and offload.compute not in ("gpu", 0):
        return "offload.compute means nothing with offload=none, where everything stays on the GPU: pass offload=cpu"
    if offload.device is OffloadDevice.none and offload.resident != 0:
        return "offload.resident means nothing with offload=none, where everything stays on the GPU: pass offload=cpu"
    if offload.device is OffloadDevice.none and offload.pin_memory is not None:
        return "offload.pin_memory means nothing with offload=none: pass offload=cpu"
    if offload.use_gds and run.hardware.device is DeviceType.cpu:
        return "offload.use_gds=true needs a CUDA GPU: pass offload.use_gds=false"
    for key in ("block_size", "queue_depth", "intra_op_parallelism"):
        value = getattr(offload.aio, key)
        if value is not None and value < 1:
            return f"offload.aio.{key} must be at least 1, not {value}: pass offload.aio.{key}=null for the profile's value"
    if offload.aio.block_size is not None and offload.aio.block_size % 4096:
        return f"offload.aio.block_size={offload.aio.block_size} is not a multiple of 4096 bytes: pass 1048576"
    for key in ("buffer_count", "buffer_size"):
        value = getattr(offload, key)
        if value is not None and value < 1:
            return f"offload.{key} must be at least 1, not {value}: pass offload.{key}=null to have it computed"
    return None


def _model(run: Run) -> str | None:
    model = run.model
    if model.architecture is None and model.path is None:
        return "model.path is required with model=local: pass model.path=/models/my-model, or a hub name"
    if model.architecture is not None and not isinstance(model.architecture.get("model_type"), str):
        return "model.architecture.model_type is required: pass +model.architecture.model_type=opt, for example"
    if run.weights.source is WeightSource.pretrained and run.weights.path is None:
        return "weights.path is required with weights=pretrained: pass weights.path=/models/my-model, or a hub name"
    if run.weights.source is WeightSource.random and run.weights.path is not None:
        return "weights.path is only used with weights=pretrained: pass weights=pretrained"
    return _revision(run)


def _revision(run: Run) -> str | None:
    model, weights = run.model, run.weights
    if model.revision is None:
        return None
    if not model.revision.strip():
        return "model.revision is empty: pass model.revision=main, or null"
    if weights.source is WeightSource.random and model.architecture is not None:
        return (
            f"model.revision={model.revision} is of the hub, and model={model.name} with random weights reads nothing there: "
            "pass weights=pretrained, or model.revision=null"
        )
    if weights.path is not None and weights.path != model.path:
        return (
            f"model.revision={model.revision} is of model.path={model.path}, and weights.path={weights.path} is another "
            "checkpoint: pass model.path and no weights.path, or model.revision=null"
        )
    return None


def _hardware(run: Run) -> str | None:
    hardware = run.hardware
    for key in ("memory_gib", "host_memory_gib"):
        value = getattr(hardware, key)
        if value is not None and not 0 < value * 2**30 < inf:
            return f"hardware.{key} must be positive and finite, not {value}: pass hardware.{key}=null for no cap"
    if hardware.cpu_threads is not None and hardware.cpu_threads < 1:
        return f"hardware.cpu_threads must be at least 1, not {hardware.cpu_threads}: pass hardware.cpu_threads=null"
    if hardware.price_per_hour is not None and not 0 < hardware.price_per_hour < inf:
        return (
            f"hardware.price_per_hour must be positive and finite, not {hardware.price_per_hour}: "
            "pass hardware.price_per_hour=null for no cost"
        )
    if hardware.peer_bytes_per_s is not None and not 1 <= hardware.peer_bytes_per_s < inf:
        return (
            f"hardware.peer_bytes_per_s must be at least 1 and finite, not {hardware.peer_bytes_per_s}: "
            "pass hardware.peer_bytes_per_s=null"
        )
    for key, value in _settings(hardware):
        least = 1 if key.endswith(("_per_s", "flops")) else 0
        if "." in key and isinstance(value, float) and not least <= value < inf:
            return f"hardware.{key} must be at least {least} and finite, not {value}: pass hardware.{key}=null"
    for dtype, rates in (hardware.calibration.gemm_flops if hardware.calibration else {}).items():
        for rows, rate in rates.items():
            if rows < 1 or not 1 <= rate < inf:
                return (
                    f"hardware.calibration.gemm_flops.{dtype}.{rows}={rate} is not a rate in FLOP/s at 1 row or more: "
                    "pass hardware.calibration=null"
                )
    if hardware.dtypes == []:
        return "hardware.dtypes=[] leaves no type to compute in: pass hardware.dtypes=null to detect them"
    for dtype in hardware.dtypes or []:
        if dtype not in ("float16", "bfloat16"):
            return f"hardware.dtypes={hardware.dtypes}: {dtype} is not a 16-bit type: pass [float16] or [bfloat16]"
    return None


def _search(run: Run) -> str | None:
    if run.search.rank is not None and run.search.rank < 0:
        return f"search.rank={run.search.rank} is not a rank: pass search.rank=0 for the best by plan, or null"
    return None


def _launch(run: Run) -> str | None:
    if not 0 < run.launch.timeout_s < inf:
        return f"launch.timeout_s must be positive and finite, not {run.launch.timeout_s}: pass launch.timeout_s=1800"
    return _machines(run)


def _machines(run: Run) -> str | None:
    nodes, endpoint, ranks = run.launch.nnodes, run.launch.rdzv_endpoint, run.hardware.num_gpus
    if nodes < 1:
        return f"launch.nnodes must be at least 1, not {nodes}: pass launch.nnodes=1"
    if ranks % nodes:
        above = -(-ranks // nodes) * nodes
        return (
            f"hardware.num_gpus={ranks} counts the GPUs of all machines and cannot be divided among launch.nnodes={nodes}: "
            f"pass hardware.num_gpus={above}"
        )
    if endpoint is not None and not is_endpoint(endpoint):
        return f"launch.rdzv_endpoint={endpoint} is no host with a port: pass launch.rdzv_endpoint=node0:29500, for example"
    if nodes > 1 and endpoint is None and not run.plan_only:
        return (
            f"launch.nnodes={nodes} needs a place where the machines meet: pass launch.rdzv_endpoint=node0:29500, for "
            "example, on each of them: the name of the one that writes the record, and a port that is free there"
        )
    return None


def _published(run: Run) -> str | None:
    return published.problem(vars(run.published)) if run.published else None


_CHECKS = (
    _integers,
    _paths,
    _model,
    _workload,
    _texts,
    _quant,
    _offload,
    _hardware,
    _search,
    _launch,
    _published,
)
