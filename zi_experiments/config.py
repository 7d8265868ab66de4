"""The schema of a run, and the door through which a Hydra configuration becomes a typed `Run`.

Types live here, values in `conf/`: no field below has a default.
"""

import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from math import inf
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zi_experiments import folders


class ConfigError(CompactHydraException, ValueError):
    """What the user asked for cannot be: one line that says what is wrong and what to type instead."""

    def __init__(self, message: str) -> None:
        # values and other people's messages, which are quoted, may have several
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


class OffloadDevice(Enum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class CacheDevice(Enum):
    gpu = "gpu"
    cpu = "cpu"


class DeviceType(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class WeightSource(Enum):
    random = "random"
    pretrained = "pretrained"


class Profile(Enum):
    tuned = "tuned"
    reference = "reference"


class Verify(Enum):
    on = "on"
    off = "off"


class TrackingMode(Enum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class Model:
    name: str
    path: str | None  # a Hugging Face folder or hub name
    architecture: dict[str, Any] | None  # the numbers of its config.json; null: read them from path


@dataclass
class Aio:
    """DeepSpeed's asynchronous I/O. A null takes the profile's value."""

    block_size: int | None
    queue_depth: int | None
    intra_op_parallelism: int | None
    single_submit: bool | None
    overlap_events: bool | None


@dataclass
class Offload:
    name: str
    device: OffloadDevice
    path: str | None  # null: inside the run's output folder
    pin_memory: bool | None  # null: whenever host memory allows it
    resident: Any  # share of the decoder layers' weights that stays on the GPU, from 0 to 1, or "auto": as much as fits
    buffer_count: int | None
    buffer_size: int | None  # elements, not bytes
    use_gds: bool
    aio: Aio


@dataclass
class Quant:
    name: str
    bits: int
    group_size: int | None
    group_dim: int | None


@dataclass
class KVCache:
    device: CacheDevice


@dataclass
class Ceilings:
    """What the machine can do at best, from which bounds follow; null: unknown."""

    link_bytes_per_s: float | None  # from pinned host memory to one GPU
    hbm_bytes_per_s: float | None  # read and written together, in the memory of the device that computes
    flops: float | None  # of one device
    disk_bytes_per_s: float | None  # read
    source: str | None


@dataclass
class Calibration:
    """What else a prediction needs, as measured on a machine; null: it has no such thing, or it was not measured."""

    link_back_bytes_per_s: float | None  # from the GPU to pinned host memory
    link_both_bytes_per_s: float | None  # each way, when both are busy
    link_pageable_bytes_per_s: float | None  # from host memory that is not pinned
    pin_bytes_per_s: float | None  # host memory pinned, page by page
    host_bytes_per_s: float | None  # read and written together, by a copy within host memory
    disk_write_bytes_per_s: float | None
    gemm_flops: dict[str, dict[int, float]]  # by 16-bit type, then by rows: those of a decode step, and of a prefill
    expand_elements_per_s: float | None  # INT4 weights expanded to 16 bits
    layer_s: float | None  # one decoder layer of plain transformers, arithmetic aside: launching its kernels
    step_s: float | None  # what `generate` does for a token besides its layers


@dataclass
class Hardware:
    name: str
    device: DeviceType
    gpu: str | None  # what the driver calls it, as a substring
    num_gpus: int
    memory_gib: float | None  # GPU memory a run may use; null: all of it
    host_memory_gib: float | None  # host memory a run may use; null: what is available
    dtypes: list[str] | None  # 16-bit types it computes, best first; null: ask the device
    ceilings: Ceilings
    calibration: Calibration | None  # null: this machine's own, once measured, with hardware=auto


@dataclass
class Engine:
    name: str
    profile: Profile | None  # DeepSpeed's only


@dataclass
class Weights:
    source: WeightSource
    seed: int
    path: str | None


@dataclass
class Workload:
    batch_size: Any  # sequences over all ranks, of one micro-batch; "auto": as many as fit
    micro_batches: int  # that go through each layer while its weights are there
    prompt_len: int
    gen_len: int
    warmup: int
    repeats: int
    seed: int
    text: str | None  # a file on which perplexity is measured; null: none

    @property
    def sequences(self) -> int:
        """Sequences of a pass, over all ranks and micro-batches; of a plan, which has a number for "auto"."""
        assert isinstance(self.batch_size, int)
        return self.batch_size * self.micro_batches


@dataclass
class Search:
    rank: int | None  # of the candidates for the best throughput, from 0 on; null: run what is asked


@dataclass
class Launch:
    timeout_s: float  # without a sign of progress: the run is stopped


@dataclass
class Tracking:
    mode: TrackingMode
    project: str
    entity: str | None
    group: str | None
    tags: list[str]


@dataclass
class Run:
    """One run, as composed from `conf/`."""

    name: str
    model: Model
    offload: Offload
    quant: Quant
    kv_cache: KVCache
    hardware: Hardware
    engine: Engine
    weights: Weights
    workload: Workload
    tracking: Tracking
    search: Search
    launch: Launch
    verify: Verify
    trust_remote_code: bool  # of a checkpoint that brings Python files
    plan_only: bool
    force: bool  # run again what a sweep has finished before


def register() -> None:
    """Make the schema known to Hydra as `schema`, which `conf/config.yaml` lists first."""
    ConfigStore.instance().store(name="schema", node=Run)
    OmegaConf.register_new_resolver("zi.basename", lambda path: Path(path).name if path else "local", replace=True)
    OmegaConf.register_new_resolver("zi.slug", folders.slug, replace=True)
    OmegaConf.register_new_resolver("zi.sweep", lambda: folders.sweep_name(_overrides(sys.argv[1:])), replace=True)
    OmegaConf.register_new_resolver("zi.data", lambda name: str(Path(__file__).parent / "data" / name), replace=True)


def _overrides(arguments: list[str]) -> list[str]:
    """What of a command line is not for Hydra itself."""
    found: list[str] = get_args_parser().parse_known_args(arguments)[0].overrides
    return found


def conf_dir() -> Path:
    """The folder of YAML files: inside the package once installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def to_run(cfg: DictConfig) -> Run:
    """The typed run behind a composed configuration.

    Raises `ConfigError` for a missing value, a key that no schema knows, or choices that cannot go together.
    """
    try:
        _refuse_stray_keys(cfg, Run, "")
        run: Run = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        message = str(error).splitlines()[0]
        raise ConfigError(f"{key or 'configuration'}: {message}" + (f": pass {key}=…" if key else "")) from error
    validate(run)
    return run


def from_choices(choices: dict[str, str], settings: dict[str, Any]) -> Run:
    """A run outside Hydra: the defaults of `conf/config.yaml`, other choices, then settings by their dotted names."""
    register()
    main: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "config.yaml"))
    defaults = {
        group: choice for entry in main["defaults"] if isinstance(entry, dict) for group, choice in entry.items()
    }
    parts = {
        str(group): OmegaConf.load(conf_dir() / str(group) / f"{choice}.yaml")
        for group, choice in (defaults | choices).items()
        if group in {field.name for field in fields(Run)}
    }
    root = {key: main[key] for key in ("name", "search", "launch", "verify", "trust_remote_code", "plan_only", "force")}
    cfg = OmegaConf.merge(OmegaConf.structured(Run), root, parts)
    assert isinstance(cfg, DictConfig)
    for key, value in settings.items():
        OmegaConf.update(cfg, key, value)
    return to_run(cfg)


def choose(run: Run, group: str, choice: str) -> None:
    """Change a run as `GROUP=CHOICE` on its command line would: what the user has set in that group stays."""
    node = getattr(run, group)
    before, after = _choice(group, getattr(node, "name", None) or node.device.value), _choice(group, choice)
    for field in fields(node):
        name = field.name
        if before is None or getattr(node, name) == getattr(before, name):
            setattr(node, name, deepcopy(getattr(after, name)))


@cache
def _choice(group: str, choice: str) -> Any:
    """What the YAML file of a choice holds; None: it is in a folder of the user's."""
    path = conf_dir() / group / f"{choice}.yaml"
    schema = get_type_hints(Run)[group]
    return (
        OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path)))
        if path.is_file()
        else None
    )


def _refuse_stray_keys(cfg: DictConfig, schema: type, prefix: str) -> None:
    hints = get_type_hints(schema)
    known = {field.name for field in fields(schema)}
    for key in map(str, cfg):
        if key not in known:
            choices = ", ".join(f"{prefix}{name}" for name in sorted(known))
            raise ConfigError(f"{prefix}{key} is not a setting (it was added with '+'). Known here: {choices}")
        node, kind = cfg._get_node(key), _not_none(hints[key])
        if not isinstance(node, DictConfig | ListConfig) or OmegaConf.is_missing(cfg, key):
            continue
        value = cfg[key]  # an interpolation can stand for anything
        plain, form = (list, "[…]") if isinstance(node, ListConfig) else (dict, "{…}")
        found = OmegaConf.get_type(value) if OmegaConf.is_config(value) else type(value)
        if found is not (kind if is_dataclass(kind) else plain) and not (value is None and node._is_optional()):
            raise ConfigError(f"{prefix}{key}={value} does not belong there: pass {prefix}{key}={form}")
        if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, DictConfig):
            _refuse_stray_keys(value, kind, f"{prefix}{key}.")


def _not_none(hint: Any) -> Any:
    """The type itself of one that may be None."""
    return next((kind for kind in get_args(hint) if is_dataclass(kind)), hint)


def validate(run: Run) -> None:
    """Raise `ConfigError` for values that cannot be, or cannot go together."""
    for check in _CHECKS:
        if problem := check(run):
            raise ConfigError(problem)


def _settings(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted name."""
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
    for key, value in _settings(run):
        if key.endswith((".path", ".text")) and value is not None and (not value.strip() or "\0" in value):
            return f"{key}={value!r} is not a path: pass {key}=/a/path, or {key}=null"
    return None


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
    if not is_auto and work.batch_size % ranks:
        below = max(ranks, work.batch_size // ranks * ranks)
        return (
            f"workload.batch_size={work.batch_size} cannot be shared by {ranks} ranks: "
            f"pass workload.batch_size={below} or {below + ranks}"
        )
    return None


def _text(run: Run) -> str | None:
    text = run.workload.text
    if text is not None and run.weights.source is WeightSource.random:
        return (
            f"workload.text={text} asks for the perplexity of random weights, which means nothing: "
            "pass weights=pretrained, or workload.text=null"
        )
    if text is not None and run.workload.prompt_len < 2:
        return "workload.prompt_len=1 leaves nothing of workload.text to predict: pass workload.prompt_len=512"
    return None


def _quant(run: Run) -> str | None:
    quant = run.quant
    if quant.bits == 16:
        if quant.group_size is not None or quant.group_dim is not None:
            return "quant.group_size and quant.group_dim mean nothing for 16-bit weights: pass quant=int4 or quant=int8"
        return None
    if quant.bits not in (4, 8):
        return f"quant.bits={quant.bits} is not supported: pass quant=int4, quant=int8 or quant=fp16"
    if quant.group_size is None or quant.group_size < 2:
        return f"quant.group_size={quant.group_size} is not a group: pass quant.group_size=64"
    if quant.group_dim not in (0, 1):
        return f"quant.group_dim={quant.group_dim} is not a dimension of a weight: pass quant.group_dim=1 (or 0)"
    return None


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
    share = offload.resident if isinstance(offload.resident, float | int) else -1
    if offload.resident != "auto" and not 0 <= share <= 1:
        return (
            f"offload.resident={offload.resident} is not a share: pass offload.resident=auto, or a number from 0 to 1"
        )
    if offload.device is OffloadDevice.none and offload.resident != 0:
        return "offload.resident means nothing with offload=none, where everything stays on the GPU: pass offload=cpu"
    if offload.device is OffloadDevice.none and offload.pin_memory is not None:
        return "offload.pin_memory means nothing with offload=none: pass offload=cpu"
    if offload.use_gds and run.hardware.device is DeviceType.cpu:
        return "offload.use_gds=true needs a CUDA GPU: pass offload.use_gds=false"
    for key in ("block_size", "queue_depth", "intra_op_parallelism"):
        value = getattr(offload.aio, key)
        if value is not None and value < 1:
            return f"offload.aio.{key} must be at least 1, not {value}: pass offload.aio.{key}=null for the profile's"
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
    return None


def _hardware(run: Run) -> str | None:
    hardware = run.hardware
    for key in ("memory_gib", "host_memory_gib"):
        value = getattr(hardware, key)
        if value is not None and not 0 < value * 2**30 < inf:
            return (
                f"hardware.{key} must be positive and finite, not {value}: pass hardware.{key}=null for what is there"
            )
    for key, value in _settings(hardware):
        least = 1 if key.endswith(("_per_s", "flops")) else 0
        if "." in key and isinstance(value, float) and not least <= value < inf:
            return f"hardware.{key} must be at least {least} and finite, not {value}: pass hardware.{key}=null"
    for dtype, rates in (hardware.calibration.gemm_flops if hardware.calibration else {}).items():
        for rows, rate in rates.items():
            if rows < 1 or not 1 <= rate < inf:
                return (
                    f"hardware.calibration.gemm_flops.{dtype}.{rows}={rate} is not a rate of a product of that many rows: "
                    "pass hardware.calibration=null"
                )
    if hardware.dtypes == []:
        return "hardware.dtypes=[] leaves no type to compute in: pass hardware.dtypes=null for those of the device"
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
    return None


def _engine(run: Run) -> str | None:
    if not run.engine.name.isidentifier():
        return f"engine.name={run.engine.name} is not an engine: pass engine=deepspeed, stream, accelerate or fsdp"
    if run.engine.name == "deepspeed":
        if run.engine.profile is None:
            return "engine.profile=null is not a profile of engine=deepspeed: pass engine.profile=tuned, or reference"
    elif run.engine.profile is not None:
        return f"engine.profile is only used with engine=deepspeed, not engine={run.engine.name}: pass engine=deepspeed"
    return None


def _streaming(run: Run) -> str | None:
    """What only the engine that moves whole layers can do."""
    if run.engine.name == "stream":
        for key in ("buffer_count", "buffer_size"):
            if getattr(run.offload, key) is not None:
                return (
                    f"offload.{key} is only used with engine=deepspeed: pass offload.{key}=null, which has it computed"
                )
        if run.offload.use_gds:
            return "offload.use_gds=true is only used with engine=deepspeed: pass offload.use_gds=false"
        return None
    if run.offload.resident != 0:
        return f"offload.resident is only used with engine=stream, not engine={run.engine.name}: pass engine=stream"
    if run.workload.micro_batches > 1:
        return (
            f"workload.micro_batches is only used with engine=stream, not engine={run.engine.name}: pass engine=stream"
        )
    return None


_CHECKS = (
    _integers,
    _paths,
    _model,
    _workload,
    _text,
    _quant,
    _offload,
    _hardware,
    _search,
    _launch,
    _engine,
    _streaming,
)
