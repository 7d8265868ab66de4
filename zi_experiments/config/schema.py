"""The schema of a run. Types live here, values in `conf/`: no field below has a default."""

import sys
from argparse import Namespace
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zi_experiments import environment
from zi_experiments.config import folders

PACKAGE = Path(__file__).resolve().parents[1]


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
    attention_flops: float | None  # of causal attention over a prompt; null, as on GPUs: as fast as products
    cache_bytes_per_s: float | None  # at which attention reads the KV cache; null, as on GPUs: that of memory
    expand_elements_per_s: float | None  # INT4 weights expanded to 16 bits
    layer_s: float | None  # one decoder layer of plain transformers, arithmetic aside: launching its kernels
    step_s: float | None  # what `generate` does for a token besides its layers
    # rates of several moments by their names in `Ceilings`, arithmetic by 16-bit type: a ceiling is the best of them, and
    # what a prediction takes their mean; null: measured once
    moments: dict[str, list[float]] | None


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
    OmegaConf.register_new_resolver("zi.folder", _folder, replace=True)
    OmegaConf.register_new_resolver("zi.sweep", lambda: folders.sweep_name(typed(sys.argv[1:]).overrides), replace=True)
    OmegaConf.register_new_resolver("zi.env", _variable, replace=True)
    OmegaConf.register_new_resolver("zi.wandb_mode", lambda: environment.wandb_mode() or "auto", replace=True)
    OmegaConf.register_new_resolver("zi.data", lambda name: str(PACKAGE / "data" / name), replace=True)


def _variable(name: str, default: Any) -> Any:
    """What a variable of the environment says, as a list where the default is one; the default where it is not set."""
    said = environment.variable(name)
    if said is None:
        return default
    return (
        [part.strip() for part in said.split(",")] if OmegaConf.is_list(default) or isinstance(default, list) else said
    )


def _folder(*, _root_: Any) -> str:
    """The name of a run as that of a folder; of one without, which is about to be refused, too."""
    try:
        name = OmegaConf.select(_root_, "name")
    except OmegaConfBaseException:
        name = None
    return folders.slug(name or "")


def typed(arguments: list[str]) -> Namespace:
    """A command line as Hydra takes it apart: `overrides`, `config_dir` and its other flags, and those `unknown` to it."""
    found, unknown = get_args_parser().parse_known_args(arguments)
    found.unknown = unknown
    return found


def literal(value: Any) -> str:
    """A value as one types it after `KEY=`."""
    if isinstance(value, Enum):
        return str(value.value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def conf_dir() -> Path:
    """The folder of YAML files: inside the package once installed from a wheel, beside it in a checkout."""
    installed = PACKAGE / "conf"
    return installed if installed.is_dir() else PACKAGE.parent / "conf"
