"""The part of a plan that is known before the engine places the weights: sizes, formats, KV cache. Pure computation."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from zi_experiments.config.schema import CacheDevice, Run
from zi_experiments.cost_model.inventory import Home
from zi_experiments.models.architecture import Architecture, Parameter
from zi_experiments.models.packing import Format, Packing, groupwise
from zi_experiments.system.machines import Machine

ELEMENT_BYTES = 2  # every run computes in a 16-bit type
GIB = 1 << 30
CONTEXT_BYTES = GIB  # CUDA context and kernels on each GPU; not counted in a cap on the memory of a run
WORKER_BYTES = 2_500_000_000  # host memory of a process with CUDA, torch and transformers, without weights
LIBRARY_BYTES = GIB // 8  # workspaces of CUDA libraries, and memory that the allocator cannot use
# names that configurations have for the number of experts that a token is routed to
ROUTED_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)
VERIFIED_SEQUENCES, VERIFIED_TOKENS = 4, 19  # size of the verified pass; tokens of each sequence, prompt and generated


def drawn_evenly(experts: int, each: int, tokens: float) -> float:
    """Return how many of a layer's experts so many tokens are routed to, if `each` of a token's are drawn evenly."""
    spared: float = (1 - each / experts) ** tokens
    return experts * (1 - spared)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A run, its model and machine, and the 16-bit type in which it computes."""

    run: Run
    architecture: Architecture
    machine: Machine
    dtype: str

    def packing(self, parameter: Parameter) -> Packing | None:
        """Return how a parameter is stored quantized; None if it is kept in 16 bits."""
        if self.run.quant.is_native:
            return parameter.native
        if not self.run.quant.is_quantized or not parameter.quantizable:
            return None
        return groupwise(self.run.quant)

    def is_quantized(self, parameter: Parameter) -> bool:
        return self.packing(parameter) is not None

    @cached_property
    def experts_are_quantized(self) -> bool:
        """True if the weights of experts are, which transformers' interface for experts computes."""
        return any(self.is_quantized(p) for p in self.architecture.parameters if p.experts)

    @cached_property
    def formats(self) -> tuple[Format, ...]:
        """The formats of quantized weights."""
        packings = (self.packing(p) for p in self.architecture.parameters)
        return tuple(dict.fromkeys(packing.format for packing in packings if packing))

    def stored_numel(self, parameter: Parameter) -> int:
        """Return the 16-bit elements that one parameter takes, over all ranks."""
        packing = self.packing(parameter)
        return parameter.numel if packing is None else ceil(packing.nbytes(parameter.shape) / ELEMENT_BYTES)

    @property
    def ranks_each(self) -> int:
        """Ranks, and GPUs, of each machine."""
        return self.run.hardware.num_gpus // self.run.launch.nnodes

    @property
    def largest_share(self) -> int:
        """Sequences of a micro-batch on the rank that has most: the others have as many, or one fewer."""
        return -(-int(self.run.workload.batch_size) // self.run.hardware.num_gpus)

    def of_one_rank(self, nbytes: int) -> int:
        """Return the part of what all sequences take, in bytes, on the rank that has most of them."""
        return nbytes // int(self.run.workload.batch_size) * self.largest_share

    @property
    def device_home(self) -> Home:
        """The memory of the device that computes."""
        return Home.gpu if self.machine.device == "cuda" else Home.cpu

    @cached_property
    def quantized_fraction(self) -> float:
        """Share of the model's parameters that are quantized."""
        return self.quantized_numel / self.architecture.num_parameters

    @cached_property
    def quantized_numel(self) -> int:
        """Parameters of the model that are quantized."""
        return sum(p.numel for p in self.architecture.parameters if self.is_quantized(p))

    @cached_property
    def expanded_bytes(self) -> int:
        """Bytes of the largest quantized matrix or stack of experts when expanded to 16 bits: often the head."""
        return ELEMENT_BYTES * max((p.numel for p in self.architecture.parameters if self.is_quantized(p)), default=0)

    @cached_property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV cache of all sequences at full length, over all ranks."""
        work = self.run.workload
        return ELEMENT_BYTES * work.sequences * self.architecture.kv_elements(work.prompt_len + work.gen_len)

    @cached_property
    def kv_slot_bytes(self) -> int:
        """Bytes of KV cache on the GPUs with `kv_cache=cpu`: two times the largest layer's, over all ranks."""
        work = self.run.workload
        tokens = work.prompt_len + work.gen_len
        largest = max((layer.elements(tokens) for layer in self.architecture.kv_layers), default=0)
        return 2 * ELEMENT_BYTES * work.sequences * largest

    @cached_property
    def widest(self) -> int:
        """Number of rows or columns, whichever is larger, of the decoder layers' widest matrix."""
        return max(max(p.shape[-2:]) for p in self.architecture.parameters if p.layer is not None and len(p.shape) > 1)

    @cached_property
    def workspace_bytes(self) -> int:
        """Bytes that a rank's pass needs beside weights and KV cache, estimated from the widths of a layer's matrices."""
        work, arch = self.run.workload, self.architecture
        sequences = self.largest_share
        within = sequences * work.prompt_len * (3 * self.widest + 6 * arch.hidden_size)
        # the embeddings are kept; with micro-batches, a layer's output is assembled while its input is still in use
        kept = 3 if work.micro_batches == 1 else 4
        between = kept * sequences * work.micro_batches * work.prompt_len * arch.hidden_size
        logits: int = 5 * sequences * work.micro_batches * arch.config.get_text_config().vocab_size
        return ELEMENT_BYTES * (within + between + logits)

    @property
    def context_bytes(self) -> int:
        """Bytes that CUDA and its libraries take of the usable memory of each GPU."""
        return LIBRARY_BYTES + (0 if self.machine.gpu_memory_is_capped else CONTEXT_BYTES)

    @property
    def host_memory_bytes(self) -> int:
        """Bytes of host memory that the run may use on all its machines, which hold equal shares of everything."""
        return self.run.launch.nnodes * self.machine.host_memory_bytes

    @property
    def process_bytes(self) -> int:
        """Bytes of host memory that the worker processes of all ranks take beside weights and KV cache."""
        return WORKER_BYTES * self.run.hardware.num_gpus if self.machine.device == "cuda" else 0

    @cached_property
    def layer_numel(self) -> int:
        """Stored elements of the largest decoder layer."""
        return max(self._sizes(self.stored_numel)[1])

    @cached_property
    def reference_bytes(self) -> int:
        """Bytes of the verification reference: 16-bit weights of the largest decoder layer, embeddings and head."""
        outside, layers = self._sizes(lambda p: p.numel)
        return ELEMENT_BYTES * (outside + max(layers))

    @property
    def observed_bytes(self) -> int:
        """Bytes that verification keeps of the engine's own passes: the hidden states between all layers."""
        arch, ways = self.architecture, 2 if self.experts or self.run.offload.compute not in ("gpu", 0) else 1
        return ways * ELEMENT_BYTES * VERIFIED_SEQUENCES * VERIFIED_TOKENS * (arch.num_layers + 1) * arch.hidden_size

    @property
    def observing_bytes(self) -> int:
        """Bytes of the engine's verified pass beside weights and buffers; unlike other passes, it keeps all logits."""
        arch, tokens = self.architecture, VERIFIED_SEQUENCES * VERIFIED_TOKENS
        within: int = 3 * self.widest + 9 * arch.hidden_size + 5 * arch.config.get_text_config().vocab_size
        return self.observed_bytes + ELEMENT_BYTES * tokens * within + self.observing_kv_bytes

    @property
    def observing_kv_bytes(self) -> int:
        """Bytes of KV cache of the verified pass on each GPU, kept until the run begins: it has the run's full length."""
        work, arch = self.run.workload, self.architecture
        if self.run.kv_cache.device is CacheDevice.cpu:
            largest = max((layer.elements(VERIFIED_TOKENS) for layer in arch.kv_layers), default=0)
            return max(self.of_one_rank(self.kv_slot_bytes), 2 * ELEMENT_BYTES * VERIFIED_SEQUENCES * largest)
        held = min(VERIFIED_SEQUENCES, self.largest_share * work.micro_batches)
        elements = held * arch.kv_elements(work.prompt_len + work.gen_len)
        return ELEMENT_BYTES * max(elements, VERIFIED_SEQUENCES * arch.kv_elements(VERIFIED_TOKENS))

    @cached_property
    def outside_numel(self) -> int:
        """Stored elements outside of the decoder layers: embeddings, head and final norm."""
        return self._sizes(self.stored_numel)[0]

    def _sizes(self, size: Callable[[Parameter], int]) -> tuple[int, list[int]]:
        """Return the total size outside of the decoder layers, and the size of each layer."""
        sizes: Counter[int | None] = Counter()
        for p in self.architecture.parameters:
            sizes[p.layer] += size(p)
        outside = sizes.pop(None, 0)
        return outside, list(sizes.values())

    @property
    def kv_link_bytes_per_pass(self) -> int:
        """Bytes of KV cache copied at least to the device in a decode step, over all ranks: the prompt's."""
        if self.run.kv_cache.device is CacheDevice.gpu or self.machine.device == "cpu":
            return 0
        return ELEMENT_BYTES * self.run.workload.sequences * self.architecture.kv_elements(self.run.workload.prompt_len)

    @property
    def routed_experts_key(self) -> str | None:
        """The configuration's name for the number of experts that a token is routed to; None if it has none."""
        text = self.architecture.config.get_text_config()
        return next((key for key in ROUTED_KEYS if getattr(text, key, None)), None)

    @property
    def routed_experts(self) -> int:
        """Number of experts per layer that one token is routed to; all if the configuration does not say.

        Where layers differ it is the smallest, since a bound follows from it.
        """
        if (key := self.routed_experts_key) is not None:
            found: int | list[int] = getattr(self.architecture.config.get_text_config(), key)
            return min(found) if isinstance(found, list) else found
        return max((p.shape[0] for p in self.architecture.parameters if p.is_experts), default=0)

    @cached_property
    def experts(self) -> int:
        """Number of experts in a decoder layer, through transformers' interface for experts; 0: the model has none."""
        return max((p.shape[0] for p in self.architecture.parameters if p.experts), default=0)

    def distinct_experts(self, tokens: float) -> float:
        """Return how many of a layer's experts so many tokens are routed to, if each token's are drawn evenly."""
        return drawn_evenly(self.experts, self.routed_experts, tokens) if self.experts else 0.0

    def active(self, size: Callable[[Parameter], int]) -> int:
        """Return the total `size` of the decoder layers' weights that one token uses."""
        routed, total = self.routed_experts, 0
        for p in self.architecture.parameters:
            if p.layer is not None and p.is_experts:
                total += size(p) // p.shape[0] * routed
            elif p.layer is not None and len(p.shape) > 1:
                total += size(p)
        return total
