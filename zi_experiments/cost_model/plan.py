"""The plan of a run: what is stored where, what crosses the link, and the bound. Pure figures; nothing is decided here."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from zi_experiments.config.schema import CacheDevice, Run
from zi_experiments.cost_model.inventory import Home, Stored
from zi_experiments.models.architecture import Architecture, Parameter
from zi_experiments.system.machines import Machine

ELEMENT_BYTES = 2  # every run computes in a 16-bit type
GIB = 1 << 30
CONTEXT_BYTES = GIB  # of CUDA on each GPU, with its kernels; a cap on the memory of a run leaves it out
WORKER_BYTES = 2_500_000_000  # of host memory, for a process with CUDA, torch and transformers beside its weights
LIBRARY_BYTES = GIB // 8  # workspaces of its libraries, and what the allocator cannot use
RATES = {
    "link": "link_bytes_per_s",
    "disk": "disk_bytes_per_s",
    "hbm": "hbm_bytes_per_s",
    "gemm": "flops",
}  # that bound
VERIFIED_SEQUENCES, VERIFIED_TOKENS = 4, 19  # what is computed to verify a model, prompt and generated tokens of each
PUBLISHED = "published"  # how the source of a vendor's rates begins


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where the weights live between passes, in bytes: each of them counted once."""

    gpu_bytes: int
    cpu_bytes: int
    nvme_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.gpu_bytes + self.cpu_bytes + self.nvme_bytes


def placement_of(stored: dict[str, Stored]) -> Placement:
    """Where parameters live that are each held once, without padding."""
    numel = Counter[Home]()
    for each in stored.values():
        numel[each.home] += each.numel
    return Placement(
        gpu_bytes=ELEMENT_BYTES * numel[Home.gpu],
        cpu_bytes=ELEMENT_BYTES * numel[Home.cpu],
        nvme_bytes=ELEMENT_BYTES * numel[Home.nvme],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """How an engine's copies, arithmetic and launches share the time of a pass: fitted to measurements, docs/limits.md."""

    hidden: float  # share of the shorter of copies and computing that hides behind the longer
    launch: float  # host work of a decoder layer, as a multiple of plain transformers'
    stall: float  # the same of the time in which neither the link nor the device works
    expand: float = 1.0  # time to expand quantized weights, as a multiple of the stream engine's
    copies: float = 0.0  # times that all weights are copied within the device's memory
    load_s: float = 2.0  # of loading that does not depend on the model's size
    load_s_per_parameter: float = 0.0  # to make or convert one
    load_s_per_quantized: float = 0.0  # to quantize one
    pinning: float = 1.0  # rate at which loading pins, as a multiple of that of one block at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """What an engine does with the weights of a plan, in bytes over all ranks unless said otherwise."""

    placement: Placement
    copied_bytes: int = 0  # of weights that every rank has to itself, on all ranks but the first
    expanded_numel: int = 0  # of quantized weights, those that are kept in 16 bits
    streamed_bytes_per_pass: int  # from host memory to the devices
    host_buffer_bytes: int = 0  # between disk and device
    gpu_buffer_bytes: int = 0  # on each GPU: weights on their way, or expanded
    parked_bytes: int = 0  # of a GPU's weights, what is in host memory while the reference needs room there
    pinnable: bool = True  # whether the engine can keep weights in pinned host memory
    locked_bytes: int = 0  # of the host's buffers, those that the process locks in memory itself
    overlap: Overlap


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """No run of this plan can be faster; None where a rate is not known that it depends on."""

    prefill_s: float | None
    decode_step_s: float | None
    prefill_limited_by: str | None
    limited_by: str | None  # what bounds a decode step: "link", "disk", "hbm" or "gemm"
    unknown: tuple[str, ...]  # the rates that are missing, by their names in `hardware.ceilings`


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is decided before anything is loaded."""

    run: Run
    architecture: Architecture
    machine: Machine
    dtype: str
    pin_memory: bool = False
    stored: Storage | None = None  # None until the engine has said where it keeps the weights

    def is_quantized(self, parameter: Parameter) -> bool:
        return self.run.quant.bits < 16 and parameter.quantizable

    def stored_numel(self, parameter: Parameter) -> int:
        """16-bit elements that one parameter takes in the reference's format, over all ranks.

        A quantized weight holds its packed integers, then a 16-bit scale and a 16-bit minimum per group.
        """
        if not self.is_quantized(parameter):
            return parameter.numel
        quant = self.run.quant
        assert quant.group_size is not None
        return parameter.numel * quant.bits // 16 + 2 * (parameter.numel // quant.group_size)

    @property
    def device_home(self) -> Home:
        """The memory of the device that computes."""
        return Home.gpu if self.machine.device == "cuda" else Home.cpu

    @property
    def uses_cuda_quantizer(self) -> bool:
        """Whether DeepSpeed expands the weights with its CUDA kernel, which knows float16 and groups of columns only."""
        quant = self.run.quant
        if quant.group_size is None or self.machine.device != "cuda":
            return False
        return self.dtype == "float16" and quant.group_dim == 1 and quant.group_size % 8 == 0

    @cached_property
    def quantized_fraction(self) -> float:
        """Share of the model's parameters that are quantized."""
        return self._quantized_numel / self.architecture.num_parameters

    @property
    def packed_fraction(self) -> float:
        """Share of the model's parameters that are stored as integers: what is quantized and not kept expanded."""
        return (self._quantized_numel - self.storage.expanded_numel) / self.architecture.num_parameters

    @cached_property
    def _quantized_numel(self) -> int:
        return sum(p.numel for p in self.architecture.parameters if self.is_quantized(p))

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
        return ELEMENT_BYTES * work.sequences * self.architecture.kv_elements(work.prompt_len + work.gen_len)

    @cached_property
    def kv_slot_bytes(self) -> int:
        """What of keys and values is on the GPU with `kv_cache=cpu`: those of two layers, over all ranks."""
        work = self.run.workload
        tokens = work.prompt_len + work.gen_len
        largest = max((layer.elements(tokens) for layer in self.architecture.kv_layers), default=0)
        return 2 * ELEMENT_BYTES * work.sequences * largest

    @cached_property
    def widest(self) -> int:
        """Rows or columns of a decoder layer's widest matrix."""
        return max(max(p.shape[-2:]) for p in self.architecture.parameters if p.layer is not None and len(p.shape) > 1)

    @cached_property
    def workspace_bytes(self) -> int:
        """What a rank's pass holds beside weights, keys and values: an estimate from the widths of a layer's matrices."""
        work, arch = self.run.workload, self.architecture
        sequences: int = work.batch_size // self.run.hardware.num_gpus
        within = sequences * work.prompt_len * (3 * self.widest + 6 * arch.hidden_size)
        # the model keeps its embeddings; micro-batches are put together into a layer's output while its input is still read
        kept = 3 if work.micro_batches == 1 else 4
        between = kept * sequences * work.micro_batches * work.prompt_len * arch.hidden_size
        logits: int = 5 * sequences * work.micro_batches * arch.config.get_text_config().vocab_size
        return ELEMENT_BYTES * (within + between + logits)

    @property
    def context_bytes(self) -> int:
        """What CUDA and its libraries take of the memory of each GPU that the run may use."""
        return LIBRARY_BYTES + (0 if self.machine.gpu_memory_is_capped else CONTEXT_BYTES)

    @property
    def process_bytes(self) -> int:
        """What the worker processes take of host memory beside weights, keys and values."""
        return WORKER_BYTES * self.run.hardware.num_gpus if self.machine.device == "cuda" else 0

    @cached_property
    def layer_numel(self) -> int:
        """Stored elements of the largest decoder layer."""
        return max(self._sizes(self.stored_numel)[1])

    @cached_property
    def reference_bytes(self) -> int:
        """What verification holds beside the model: plain 16-bit weights of one decoder layer, embeddings and head."""
        outside, layers = self._sizes(lambda p: p.numel)
        return ELEMENT_BYTES * (outside + max(layers))

    @property
    def observed_bytes(self) -> int:
        """What verification keeps of the engine's own pass: the hidden states between all layers."""
        arch = self.architecture
        return ELEMENT_BYTES * VERIFIED_SEQUENCES * VERIFIED_TOKENS * (arch.num_layers + 1) * arch.hidden_size

    @property
    def observing_bytes(self) -> int:
        """What the engine's pass takes that is verified, beside weights and buffers: the logits of all tokens too."""
        arch, tokens = self.architecture, VERIFIED_SEQUENCES * VERIFIED_TOKENS
        within: int = 3 * self.widest + 9 * arch.hidden_size + 5 * arch.config.get_text_config().vocab_size
        return self.observed_bytes + ELEMENT_BYTES * tokens * within + self.observing_kv_bytes

    @property
    def observing_kv_bytes(self) -> int:
        """The KV cache of that pass on the GPU until the run begins: its sequences have the room of those of the run."""
        work, arch, ranks = self.run.workload, self.architecture, self.run.hardware.num_gpus
        if self.run.kv_cache.device is CacheDevice.cpu:
            largest = max((layer.elements(VERIFIED_TOKENS) for layer in arch.kv_layers), default=0)
            return max(self.kv_slot_bytes // ranks, 2 * ELEMENT_BYTES * VERIFIED_SEQUENCES * largest)
        held = min(VERIFIED_SEQUENCES, work.sequences // ranks)
        elements = held * arch.kv_elements(work.prompt_len + work.gen_len)
        return ELEMENT_BYTES * max(elements, VERIFIED_SEQUENCES * arch.kv_elements(VERIFIED_TOKENS))

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

    @property
    def storage(self) -> Storage:
        assert self.stored is not None
        return self.stored

    @property
    def weight_bytes(self) -> int:
        """All weights as the engine stores them, each counted once."""
        return self.placement.total_bytes

    @property
    def placement(self) -> Placement:
        return self.storage.placement

    @property
    def streamed_bytes_per_pass(self) -> int:
        """Bytes of weights that cross from host memory to the device in one forward pass, over all ranks."""
        return self.storage.streamed_bytes_per_pass

    @property
    def kv_link_bytes_per_pass(self) -> int:
        """Bytes of keys and values that cross to the device in a decode step, over all ranks: at least the prompt's."""
        if self.run.kv_cache.device is CacheDevice.gpu or self.machine.device == "cpu":
            return 0
        return ELEMENT_BYTES * self.run.workload.sequences * self.architecture.kv_elements(self.run.workload.prompt_len)

    @property
    def link_bytes_per_pass(self) -> int:
        """Bytes that have to cross from host memory to the device in a decode step, over all ranks."""
        return self.streamed_bytes_per_pass + self.kv_link_bytes_per_pass

    @cached_property
    def bound(self) -> Bound:
        """The plan's lower bound on time. Sources: the roofline model, with a link and a disk beside memory and arithmetic.

        A pass takes at least streamed bytes / link, disk bytes / disk rate, and weights + keys and values / HBM; streamed
        are weights, and in a decode step keys and values that live in host memory, those of the prompt at least;
        arithmetic takes 2 · parameters · tokens, plus 2 · B · P² · h · L for causal attention in prefill. Weights that
        meet a token are those of the decoder layers, and of experts those that one token is routed to.
        """
        work, arch = self.run.workload, self.architecture
        traffic: dict[str, float] = {"link": self.streamed_bytes_per_pass, "disk": self.placement.nvme_bytes}
        kv = ELEMENT_BYTES * work.sequences * arch.kv_elements(work.prompt_len)
        flops_per_token = 2 * self._active(lambda p: p.numel)
        decode = traffic | {
            "link": self.link_bytes_per_pass,
            "hbm": ELEMENT_BYTES * self._active(self.stored_numel) + kv,
            "gemm": flops_per_token * work.sequences,
        }
        attention = 2 * work.sequences * work.prompt_len**2 * arch.hidden_size * arch.num_layers
        prefill = traffic | {"gemm": flops_per_token * work.sequences * work.prompt_len + attention}
        prefill_limited_by, prefill_s = self._longest(prefill)
        limited_by, decode_step_s = self._longest(decode)
        return Bound(
            prefill_s=prefill_s,
            decode_step_s=decode_step_s,
            prefill_limited_by=prefill_limited_by,
            limited_by=limited_by,
            unknown=self._unknown(decode | prefill),
        )

    def rate(self, limit: str) -> float | None:
        """What bounds a pass, at best and on all devices together, which share the disk; None: unknown."""
        known = self.machine.calibration
        each: float | None = getattr(self.machine.ceilings, RATES[limit])
        if limit == "gemm" and known and (moments := (known.moments or {}).get(self.dtype)):
            each = max((*moments, *known.gemm_flops.get(self.dtype, {}).values()))  # another type may be faster
        return each and each * (1 if limit == "disk" else self.run.hardware.num_gpus)

    def is_published(self, limit: str | None) -> bool:
        """Whether the rate is from a vendor's data sheet; no such sheet knows the disk."""
        return limit not in (None, "disk") and (self.machine.ceilings.source or "").startswith(PUBLISHED)

    def _longest(self, amounts: dict[str, float]) -> tuple[str, float] | tuple[None, None]:
        """What of a pass takes longest, and how long; None where that depends on an unknown rate."""
        if self._unknown(amounts):
            return None, None
        seconds = {name: amount / rate for name, amount in amounts.items() if (rate := self.rate(name))}
        name = max(seconds, key=lambda each: seconds[each])
        return name, seconds[name]

    def _unknown(self, amounts: dict[str, float]) -> tuple[str, ...]:
        return tuple(RATES[name] for name, amount in amounts.items() if amount and not self.rate(name))

    @property
    def routed_experts(self) -> int:
        """Experts of a layer that one token is sent to; of a configuration that does not say, all."""
        experts = [p.shape[0] for p in self.architecture.parameters if p.is_experts]
        return getattr(self.architecture.config.get_text_config(), "num_experts_per_tok", None) or max(
            experts, default=0
        )

    def _active(self, size: Callable[[Parameter], int]) -> int:
        """Size of the decoder layers' weights that one token is multiplied with."""
        routed, total = self.routed_experts, 0
        for p in self.architecture.parameters:
            if p.layer is not None and p.is_experts:
                total += size(p) // p.shape[0] * routed
            elif p.layer is not None and len(p.shape) > 1:
                total += size(p)
        return total
