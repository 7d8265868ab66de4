"""`Run + Architecture + Machine → Plan`: dtype, what is stored where, whether it fits, and the bound. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from zi_experiments.architecture import Architecture, Parameter
from zi_experiments.config import CacheDevice, ConfigError, OffloadDevice, Profile, Run
from zi_experiments.hardware import Machine

ELEMENT_BYTES = 2  # every run computes in a 16-bit type
MIN_SWAP_BYTES = 1 << 20  # DeepSpeed keeps smaller parameters in memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where the weights live between passes, in bytes over all ranks."""

    gpu_bytes: int
    cpu_bytes: int
    nvme_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """No run of this plan can be faster, as far as the ceilings are known; None where they are not."""

    prefill_s: float | None
    decode_step_s: float | None
    limited_by: str | None  # what bounds a decode step: "link", "disk", "hbm" or "flops"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is decided before anything is loaded."""

    run: Run
    architecture: Architecture
    machine: Machine
    dtype: str
    pin_memory: bool

    def is_quantized(self, parameter: Parameter) -> bool:
        return self.run.quant.bits < 16 and parameter.quantizable

    def stored_numel(self, parameter: Parameter) -> int:
        """16-bit elements that one parameter takes in DeepSpeed's storage, over all ranks.

        A quantized weight holds its packed integers, then a 16-bit scale and a 16-bit minimum per group.
        """
        if not self.is_quantized(parameter):
            return parameter.numel
        quant = self.run.quant
        assert quant.group_size is not None
        return parameter.numel * quant.bits // 16 + 2 * (parameter.numel // quant.group_size)

    @cached_property
    def weight_bytes(self) -> int:
        return ELEMENT_BYTES * sum(self.stored_numel(p) for p in self.architecture.parameters)

    @property
    def uses_cuda_quantizer(self) -> bool:
        """Whether DeepSpeed expands the weights with its CUDA kernel, which knows float16 only."""
        return self.run.quant.bits < 16 and self.dtype == "float16" and self.machine.device == "cuda"

    @cached_property
    def quantized_fraction(self) -> float:
        """Share of the model's parameters that are stored quantized."""
        quantized = sum(p.numel for p in self.architecture.parameters if self.is_quantized(p))
        return quantized / self.architecture.num_parameters

    @cached_property
    def kv_cache_bytes(self) -> int:
        """Keys and values of all sequences at full length, over all ranks."""
        work = self.run.workload
        tokens = work.batch_size * (work.prompt_len + work.gen_len)
        return ELEMENT_BYTES * tokens * self.architecture.kv_elements_per_token()

    @cached_property
    def layer_numel(self) -> int:
        """Stored elements of the largest-possible decoder layer: their mean, since layers are of one class."""
        in_layers = sum(self.stored_numel(p) for p in self.architecture.parameters if p.in_layers)
        return ceil(in_layers / self.architecture.num_layers)

    @cached_property
    def outside_numel(self) -> int:
        """Stored elements of embeddings, head and final norm."""
        return sum(self.stored_numel(p) for p in self.architecture.parameters if not p.in_layers)

    @cached_property
    def persistence_numel(self) -> int:
        """Parameters of at most this many stored elements stay on the GPU."""
        if self.run.engine.profile is Profile.reference:
            return self.architecture.hidden_size
        # biases and norms: copying each on demand costs more than its bytes
        return max((p.numel for p in self.architecture.parameters if len(p.shape) == 1), default=0)

    @cached_property
    def swap_block_bytes(self) -> int:
        """Block size of asynchronous I/O."""
        reference = 16 * MIN_SWAP_BYTES
        default = reference if self.run.engine.profile is Profile.reference else MIN_SWAP_BYTES
        return self.run.offload.aio.block_size or default

    @cached_property
    def swapped(self) -> list[Parameter]:
        """The parameters that DeepSpeed puts on disk: those whose partition is at least a block and 1 MiB."""
        return [p for p in self.architecture.parameters if self._is_swapped(p)]

    def _is_swapped(self, parameter: Parameter) -> bool:
        partition = ceil(self.stored_numel(parameter) / self.run.hardware.num_gpus) * ELEMENT_BYTES
        large = partition >= max(MIN_SWAP_BYTES, self.swap_block_bytes)
        return self.run.offload.device is OffloadDevice.nvme and large

    @cached_property
    def disk_bytes(self) -> int:
        """Space that loading takes on disk: the weights there, and tied ones, which are written before they are tied."""
        tied = sum(self.stored_numel(p) for p in self.architecture.tied if self._is_swapped(p))
        return self.placement.nvme_bytes + tied * ELEMENT_BYTES

    @cached_property
    def placement(self) -> Placement:
        everything = self.weight_bytes
        if self.run.offload.device is OffloadDevice.none:
            on_cpu = self.machine.device == "cpu"
            return Placement(gpu_bytes=0 if on_cpu else everything, cpu_bytes=everything if on_cpu else 0, nvme_bytes=0)
        nvme = ELEMENT_BYTES * sum(self.stored_numel(p) for p in self.swapped)
        gpu = everything - nvme - self._host_bytes()
        return Placement(gpu_bytes=gpu, cpu_bytes=everything - nvme - gpu, nvme_bytes=nvme)

    @cached_property
    def streamed_bytes_per_pass(self) -> int:
        """Bytes that cross from host memory to the device in one forward pass, over all ranks."""
        if self.run.offload.device is OffloadDevice.none or self.machine.device == "cpu":
            return 0  # on a CPU there is no link to cross
        return self.placement.cpu_bytes + self.placement.nvme_bytes

    def _host_bytes(self) -> int:
        swapped = {p.name for p in self.swapped}
        return ELEMENT_BYTES * sum(
            self.stored_numel(p)
            for p in self.architecture.parameters
            if p.name not in swapped and self.stored_numel(p) > self.persistence_numel
        )

    @cached_property
    def buffer_numel(self) -> int:
        """Elements of one NVMe buffer: the largest partition on disk."""
        if self.run.offload.buffer_size is not None:
            return self.run.offload.buffer_size
        if self.run.engine.profile is Profile.reference:
            return self._reference_buffers[1]
        ranks = self.run.hardware.num_gpus
        return max((ceil(self.stored_numel(p) / ranks) for p in self.swapped), default=MIN_SWAP_BYTES)

    @cached_property
    def buffer_count(self) -> int:
        """NVMe buffers: two layers' parameters, so that one is read while the other is used, and the rest of the model."""
        if self.run.offload.buffer_count is not None:
            return self.run.offload.buffer_count
        if self.run.engine.profile is Profile.reference:
            return self._reference_buffers[0]
        in_layers = sum(p.in_layers for p in self.swapped)
        outside = len(self.swapped) - in_layers
        return 2 * ceil(in_layers / self.architecture.num_layers) + outside + 1

    @property
    def _reference_buffers(self) -> tuple[int, int]:
        """Count and size, in elements, that the reference script uses."""
        if self.architecture.model_type == "bloom":
            return (3, 8 << 30) if self.run.offload.use_gds else (5, 9 << 30)
        if self.architecture.model_type == "mixtral":
            return (10, 1 << 30)
        return (5, 2 << 30)

    def buffer_bytes_host(self) -> int:
        """Host memory of the NVMe buffers, over all ranks; with GPUDirect Storage they are on the GPU."""
        if not self.swapped or self.run.offload.use_gds:
            return 0
        return self.buffer_numel * self.buffer_count * ELEMENT_BYTES * self.run.hardware.num_gpus

    @cached_property
    def live_layers(self) -> int:
        """Decoder layers that may be on the GPU at once: the one that computes and those on their way."""
        layer = self.layer_numel * ELEMENT_BYTES
        memory = self.machine.gpu_memory_bytes
        if memory is None:
            return 4
        room = memory - self.kv_cache_bytes - self.outside_numel * ELEMENT_BYTES
        return max(2, min(4, room // (2 * layer)))

    @cached_property
    def bound(self) -> Bound:
        """The plan's lower bound on time. Sources: the roofline model, with a link and a disk beside memory and arithmetic.

        A pass takes at least streamed bytes / link, disk bytes / disk rate, and weights + keys and values / HBM;
        arithmetic takes 2 · parameters · tokens, plus 2 · B · P² · h · L for causal attention in prefill. Weights that
        meet a token are those of the decoder layers, and of experts those that one token is routed to.
        """
        work, ranks, rates = self.run.workload, self.run.hardware.num_gpus, self.machine.ceilings
        arch = self.architecture
        traffic = {
            "link": _over(self.streamed_bytes_per_pass, rates.link_bytes_per_s, ranks),
            "disk": _over(self.placement.nvme_bytes, rates.disk_bytes_per_s, 1),
        }
        kv = self.kv_cache_bytes * work.prompt_len // (work.prompt_len + work.gen_len)
        flops_per_token = 2 * self._active(lambda p: p.numel)
        weights = ELEMENT_BYTES * self._active(self.stored_numel)
        decode = traffic | {
            "hbm": _over(weights + kv, rates.hbm_bytes_per_s, ranks),
            "flops": _over(flops_per_token * work.batch_size, rates.flops, ranks),
        }
        attention = 2 * work.batch_size * work.prompt_len**2 * arch.hidden_size * arch.num_layers
        tokens = work.batch_size * work.prompt_len
        prefill = traffic | {"flops": _over(flops_per_token * tokens + attention, rates.flops, ranks)}
        known = {name: seconds for name, seconds in decode.items() if seconds}
        return Bound(
            prefill_s=max((seconds for seconds in prefill.values() if seconds), default=None),
            decode_step_s=max(known.values(), default=None),
            limited_by=max(known, key=lambda name: known[name], default=None),
        )

    def _active(self, size: Callable[[Parameter], int]) -> int:
        """Size of the decoder layers' weights that one token is multiplied with."""
        routed = getattr(self.architecture.config.get_text_config(), "num_experts_per_tok", None)
        total = 0
        for p in self.architecture.parameters:
            if p.in_layers and len(p.shape) == 3 and routed:
                total += size(p) // p.shape[0] * routed
            elif p.in_layers and len(p.shape) > 1:
                total += size(p)
        return total


def _over(amount: float, rate: float | None, devices: int) -> float | None:
    return amount / (rate * devices) if rate else None


def build(run: Run, architecture: Architecture, machine: Machine) -> Plan:
    """The plan of a run. Raises `ConfigError`, with numbers and a way out, when it cannot work or fit."""
    _check_lengths(run, architecture)
    _check_groups(run, architecture)
    plan = Plan(
        run=run,
        architecture=architecture,
        machine=machine,
        dtype=choose_dtype(architecture, machine),
        pin_memory=False,
    )
    _check_fit(plan)
    return Plan(run=run, architecture=architecture, machine=machine, dtype=plan.dtype, pin_memory=_pin(plan))


def choose_dtype(architecture: Architecture, machine: Machine) -> str:
    """The configuration's 16-bit type where the device computes it, else the device's best."""
    return architecture.dtype if architecture.dtype in machine.dtypes else machine.dtypes[0]


def _pin(plan: Plan) -> bool:
    """Whether weights in host memory are pinned: as asked, or (tuned) when they leave a tenth of it free."""
    offload = plan.run.offload
    if plan.machine.device != "cuda" or offload.device is OffloadDevice.none:
        return False
    if offload.pin_memory is not None:
        return offload.pin_memory
    if plan.run.engine.profile is Profile.reference:
        return False
    return plan.placement.cpu_bytes + plan.buffer_bytes_host() < 0.9 * plan.machine.host_memory_bytes


def _check_lengths(run: Run, architecture: Architecture) -> None:
    work, longest = run.workload, architecture.max_positions
    if longest is not None and work.prompt_len + work.gen_len > longest:
        fits = f"workload.prompt_len={longest - work.gen_len}"
        if work.gen_len >= longest:
            fits = f"workload.gen_len={max(1, longest // 2)} workload.prompt_len={longest - longest // 2 - 1}"
        raise ConfigError(
            f"workload.prompt_len={work.prompt_len} and workload.gen_len={work.gen_len} exceed the {longest} positions of "
            f"{run.model.name}: pass {fits} or less"
        )


def _check_groups(run: Run, architecture: Architecture) -> None:
    quant = run.quant
    if quant.bits == 16:
        return
    assert quant.group_size is not None
    assert quant.group_dim is not None
    sizes = {p.shape[quant.group_dim] for p in architecture.parameters if p.quantizable}
    for p in architecture.parameters:
        if p.quantizable and (p.shape[quant.group_dim] % quant.group_size or p.shape[-1] % 2):
            working = [g for g in (64, 128, 32, 16, 8) if all(size % g == 0 for size in sizes)]
            advice = f"pass quant.group_size={working[0]}" if working else "pass quant=fp16"
            raise ConfigError(
                f"quant.group_size={quant.group_size} does not divide dimension {quant.group_dim} of {p.name} "
                f"{list(p.shape)}: {advice}"
            )


def _check_fit(plan: Plan) -> None:
    _check_choices(plan)
    _check_host(plan)
    if plan.machine.gpu_memory_bytes is not None:
        _check_gpu(plan, plan.machine.gpu_memory_bytes)


def _check_choices(plan: Plan) -> None:
    if plan.machine.device == "cuda":
        return
    if plan.run.offload.use_gds:
        raise ConfigError(
            "offload.use_gds=true needs a CUDA GPU and this run is on the CPU: pass offload.use_gds=false"
        )
    if plan.run.hardware.memory_gib is not None:
        raise ConfigError(
            "hardware.memory_gib is the memory of a GPU and this run is on the CPU: pass hardware.memory_gib=null, "
            f"or hardware.host_memory_gib={plan.run.hardware.memory_gib} for the host's"
        )


def _check_host(plan: Plan) -> None:
    run, machine, placement = plan.run, plan.machine, plan.placement
    buffers = plan.buffer_bytes_host()
    if buffers > machine.host_memory_bytes:
        profile = (
            "" if run.engine.profile is Profile.tuned else ", or engine.profile=tuned, which computes smaller ones"
        )
        raise ConfigError(
            f"{plan.buffer_count} NVMe buffers of {plan.buffer_numel} elements take {_gb(buffers)} of host memory and "
            f"{_gb(machine.host_memory_bytes)} are available: pass a smaller offload.buffer_count{profile}"
        )
    weights = placement.cpu_bytes + buffers
    if weights > machine.host_memory_bytes:
        ways = [] if run.offload.device is OffloadDevice.nvme else ["offload=nvme"]
        ways += [] if run.quant.bits == 4 else ["quant=int4"]
        raise ConfigError(
            f"{run.model.name} needs {_gb(weights)} of host memory and {_gb(machine.host_memory_bytes)} are available: "
            f"pass {' or '.join(ways or ['model=… of a smaller one'])}"
        )
    kv = plan.kv_cache_bytes if machine.device == "cpu" or run.kv_cache.device is CacheDevice.cpu else 0
    if weights + kv > machine.host_memory_bytes:
        room = machine.host_memory_bytes - weights
        raise ConfigError(
            f"keys and values of {run.workload.batch_size} sequences take {_gb(kv)} of host memory, beside {_gb(weights)} "
            f"of weights, and {_gb(machine.host_memory_bytes)} are available: pass {_smaller_batch(plan, kv, room)}"
        )


def _check_gpu(plan: Plan, memory: int) -> None:
    run, placement, ranks = plan.run, plan.placement, plan.run.hardware.num_gpus
    kv = plan.kv_cache_bytes // ranks if run.kv_cache.device is CacheDevice.gpu else 0
    live = 0 if run.offload.device is OffloadDevice.none else 2 * plan.layer_numel * ELEMENT_BYTES
    weights = placement.gpu_bytes // ranks
    if weights + live > memory:
        ways = ["offload=cpu"] if run.offload.device is OffloadDevice.none else ["a larger hardware.memory_gib"]
        ways += [] if run.quant.bits == 4 else ["quant=int4"]
        raise ConfigError(
            f"{run.model.name} needs {_gb(weights + live)} on each GPU for weights and each has {_gb(memory)}: "
            f"pass {' or '.join(ways)}"
        )
    if weights + live + kv > memory:
        room = memory - weights - live
        raise ConfigError(
            f"keys and values of {run.workload.batch_size} sequences take {_gb(kv)} on each GPU, beside {_gb(weights + live)} "
            f"of weights, and each has {_gb(memory)}: pass {_smaller_batch(plan, kv, room)}, or kv_cache=cpu"
        )


def _smaller_batch(plan: Plan, kv_bytes: int, room_bytes: int) -> str:
    """What to type so that keys and values fit: fewer sequences, or shorter ones when one is too long."""
    work, ranks = plan.run.workload, plan.run.hardware.num_gpus
    batch = work.batch_size * room_bytes // kv_bytes // ranks * ranks
    if batch:
        return f"workload.batch_size={batch}"
    tokens = work.batch_size * (work.prompt_len + work.gen_len) * room_bytes // kv_bytes // ranks
    return f"workload.prompt_len={max(1, tokens - work.gen_len)} workload.batch_size={ranks}"


def _gb(amount: int) -> str:
    return f"{amount / 1e9:.1f} GB"
