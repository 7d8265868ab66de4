"""The plan of a run: what is stored where, what crosses the link, and the bound. Pure figures; nothing is decided here."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from zi_experiments.architecture import Architecture, Parameter
from zi_experiments.config import OffloadDevice, Profile, Run
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
        """Whether DeepSpeed expands the weights with its CUDA kernel, which knows float16 and groups of columns only."""
        quant = self.run.quant
        if quant.group_size is None or self.machine.device != "cuda":
            return False
        return self.dtype == "float16" and quant.group_dim == 1 and quant.group_size % 8 == 0

    @cached_property
    def quantized_fraction(self) -> float:
        """Share of the model's parameters that are stored quantized."""
        quantized = sum(p.numel for p in self.architecture.parameters if self.is_quantized(p))
        return quantized / self.architecture.num_parameters

    @property
    def bits_per_weight(self) -> float:
        """Bits that a parameter takes on average as stored: scales, minima and what is not quantized included."""
        return 8 * self.weight_bytes / self.architecture.num_parameters

    @cached_property
    def expanded_bytes(self) -> int:
        """The largest quantized matrix, or stack of experts, as it is expanded to be multiplied with: often the head."""
        return ELEMENT_BYTES * max((p.numel for p in self.architecture.parameters if self.is_quantized(p)), default=0)

    @cached_property
    def kv_cache_bytes(self) -> int:
        """Keys and values of all sequences at full length, over all ranks."""
        work = self.run.workload
        return ELEMENT_BYTES * work.batch_size * self.architecture.kv_elements(work.prompt_len + work.gen_len)

    @cached_property
    def kv_slot_bytes(self) -> int:
        """What of keys and values is on the GPU with `kv_cache=cpu`: those of two layers, over all ranks."""
        work = self.run.workload
        tokens = work.prompt_len + work.gen_len
        largest = max((layer.elements(tokens) for layer in self.architecture.kv_layers), default=0)
        return 2 * ELEMENT_BYTES * work.batch_size * largest

    @cached_property
    def layer_numel(self) -> int:
        """Stored elements of the largest decoder layer."""
        return max(self._sizes(self.stored_numel)[1])

    @cached_property
    def reference_bytes(self) -> int:
        """What verification holds beside the model: plain 16-bit weights of one decoder layer, embeddings and head."""
        outside, layers = self._sizes(lambda p: p.numel)
        return ELEMENT_BYTES * (outside + max(layers))

    @cached_property
    def outside_numel(self) -> int:
        """Stored elements of embeddings, head and final norm."""
        return self._sizes(self.stored_numel)[0]

    def _sizes(self, size: Callable[[Parameter], int]) -> tuple[int, list[int]]:
        """Size of what is outside of decoder layers, and of each layer."""
        sizes: Counter[int | None] = Counter()
        for p in self.architecture.parameters:
            sizes[p.layer] += size(p)
        outside = sizes.pop(None, 0)
        return outside, list(sizes.values())

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
        layers = Counter(p.layer for p in self.swapped)
        outside = layers.pop(None, 0)
        return 2 * max(layers.values(), default=0) + outside + 1

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
        kv = ELEMENT_BYTES * work.batch_size * arch.kv_elements(work.prompt_len)
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
            if p.layer is not None and p.is_experts and routed:
                total += size(p) // p.shape[0] * routed
            elif p.layer is not None and len(p.shape) > 1:
                total += size(p)
        return total


def _over(amount: float, rate: float | None, devices: int) -> float | None:
    return amount / (rate * devices) if rate else None
