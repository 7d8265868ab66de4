"""The schema of a run. Types are here, values are in `conf/`: no field below has a default."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.errors import CompactHydraException

from zi_experiments.config.published import Published, Question

PACKAGE = Path(__file__).resolve().parents[1]


class ConfigError(CompactHydraException, ValueError):
    """The configuration is invalid or cannot be run: one line that says what is wrong and what to type instead."""

    def __init__(self, message: str) -> None:
        # the values and library messages that it quotes may have several lines
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


class InapplicableError(ConfigError):
    """The same, of a setting that this model or engine does not have: an experiment leaves such a run out."""


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


class Dtype(Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"


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
    path: str | None  # a Hugging Face folder, a hub name, or a .gguf file
    revision: str | None  # branch, tag or commit on the hub; null: the default branch
    architecture: dict[str, Any] | None  # the numbers of its config.json; null: read them from path


@dataclass
class Aio:
    """DeepSpeed's asynchronous I/O; null: the profile's value."""

    block_size: int | None
    queue_depth: int | None
    intra_op_parallelism: int | None
    single_submit: bool | None
    overlap_events: bool | None


@dataclass
class Offload:
    name: str
    device: OffloadDevice
    path: Any  # a folder, or a list of them on several drives; null: inside the run's output folder
    pin_memory: bool | None  # null: pinned if enough host memory stays free
    resident: Any  # share of the decoder layers' weights kept on the GPU, from 0 to 1, or "auto": as much as fits
    # share of the decoder layers, or of the experts not on the GPU, whose decode steps the host computes, from 0 to 1, "gpu":
    # none, or "auto"
    compute: Any
    buffer_count: int | None
    buffer_size: int | None  # elements, not bytes
    use_gds: bool
    aio: Aio

    @property
    def folders(self) -> list[str]:
        """The folders of `path`, as typed."""
        return [self.path] if isinstance(self.path, str) else self.path or []


@dataclass
class Quant:
    name: str
    bits: int | None  # null: the format in which checkpoints of the model are published
    group_size: int | None
    group_dim: int | None

    @property
    def is_native(self) -> bool:
        return self.bits is None

    @property
    def is_quantized(self) -> bool:
        """False if all weights are kept in 16 bits."""
        return self.bits != 16


@dataclass
class KVCache:
    device: CacheDevice


@dataclass
class Ceilings:
    """Peak rates of the machine, used for bounds; null: unknown."""

    link_bytes_per_s: float | None  # from pinned host memory to one GPU
    hbm_bytes_per_s: float | None  # bytes read plus bytes written, in the memory of the device that computes
    flops: float | None  # per second, of one device
    disk_bytes_per_s: float | None  # reads
    host_memory_bytes_per_s: float | None  # by its cores and by copies to the GPUs together
    source: str | None


@dataclass
class Calibration:
    """Further measured rates, used for predictions; null: not measured, or the machine has no such part."""

    link_back_bytes_per_s: float | None  # from the GPU to pinned host memory
    link_both_bytes_per_s: float | None  # each direction, when both are busy
    link_pageable_bytes_per_s: float | None  # from host memory that is not pinned to the GPU
    pin_bytes_per_s: float | None  # host memory allocated and pinned
    host_bytes_per_s: float | None  # bytes read plus bytes written, by a copy within host memory
    disk_write_bytes_per_s: float | None
    gemm_flops: dict[str, dict[int, float]]  # by 16-bit type, then by rows: few as in a decode step, many as in prefill
    attention_flops: float | None  # of causal attention over a prompt; null, as on GPUs: the rate of matrix products
    cache_bytes_per_s: float | None  # at which attention reads the KV cache; null, as on GPUs: that of memory
    expand_elements_per_s: float | None  # INT4 weights expanded to 16 bits
    layer_s: float | None  # launch overhead of one decoder layer of plain transformers, without arithmetic
    step_s: float | None  # time of a decode step of `generate` outside the layers
    host_read_bytes_per_s: float | None  # at which the host's cores read memory; null, as on a CPU: not measured
    # a decode step of one of the run's decoder layers on the host's cores: alone, and while copies to the GPU run, with the
    # rate of those; null: not measured, since the host computes no layer
    host_layer_s: float | None
    host_layer_busy_s: float | None
    link_busy_bytes_per_s: float | None
    # at which the host's cores compute the run's experts while copies to the GPU run; null: as above
    host_experts_bytes_per_s: float | None
    # rates measured at several moments, by their names in `Ceilings`, arithmetic by 16-bit type: the ceiling is the best
    # of them, a prediction takes their mean; null: measured once
    moments: dict[str, list[float]] | None


@dataclass
class Hardware:
    name: str
    device: DeviceType
    gpu: str | None  # model name, contained in the driver's name of the GPU
    num_gpus: int  # of all machines together: each of launch.nnodes machines has an equal share
    memory_gib: float | None  # GPU memory a run may use; null: all of it
    host_memory_gib: float | None  # host memory that a run may use on each machine; null: what is available
    cpu_threads: int | None  # that compute layers on the host; null: one for each core of the GPU's NUMA node, less one
    dtypes: list[str] | None  # 16-bit types it computes in, best first; null: detect them
    price_per_hour: float | None  # of a whole machine, in any currency; null: no cost is computed
    peer_bytes_per_s: float | None  # that a GPU receives from the others of its machine over links of their own
    ceilings: Ceilings
    calibration: Calibration | None  # null: measured on this machine with hardware=auto, else unknown


@dataclass
class Engine:
    name: str
    profile: Profile | None  # only DeepSpeed has profiles


@dataclass
class Weights:
    source: WeightSource
    seed: int
    path: str | None


@dataclass
class Workload:
    batch_size: Any  # sequences of one micro-batch, over all ranks; "auto": as many as fit
    micro_batches: int  # each layer processes all of them before its weights are dropped
    prompt_len: int
    gen_len: int
    warmup: int
    repeats: int
    seed: int
    prompts: str | None  # text file that the prompts are taken from; null: random ids
    text: str | None  # file on which perplexity is measured; null: no perplexity

    @property
    def sequences(self) -> int:
        """Sequences of a pass, over all ranks and micro-batches. Only in a plan, where "auto" is replaced by a number."""
        assert isinstance(self.batch_size, int)
        return self.batch_size * self.micro_batches


@dataclass
class Search:
    rank: int | None  # index among the candidates for the best throughput, from 0; null: no search, the run itself
    typed: list[str]  # overrides as typed: the search does not vary what they set


@dataclass
class Launch:
    timeout_s: float  # the run is stopped after so long without progress
    nnodes: int  # machines that run this command together
    rdzv_endpoint: str | None  # HOST:PORT where they meet; HOST is the machine that writes the record


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
    dtype: Dtype | None  # in which the run computes; null: the model's own type, or the device's best
    verify: Verify
    trust_remote_code: bool  # run the Python files of a checkpoint
    plan_only: bool
    force: bool  # repeat runs that a sweep has already finished
    question: Question | None
    published: Published | None


def conf_dir() -> Path:
    """Return the folder of YAML files: inside the package when installed from a wheel, beside it in a checkout."""
    installed = PACKAGE / "conf"
    return installed if installed.is_dir() else PACKAGE.parent / "conf"
