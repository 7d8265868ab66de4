"""The plan of a run: what is stored where, and what is copied to the GPU. Pure data; the planner makes the decisions."""

from collections import Counter
from dataclasses import dataclass

from zi_experiments.cost_model.inventory import Home, Stored
from zi_experiments.cost_model.spec import ELEMENT_BYTES, Spec


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Bytes of weights in each memory between passes, each weight counted once."""

    gpu_bytes: int
    cpu_bytes: int
    nvme_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.gpu_bytes + self.cpu_bytes + self.nvme_bytes


def placement_of(stored: dict[str, Stored]) -> Placement:
    """Return the placement of parameters, each counted once and without padding."""
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
    """How an engine overlaps copies, arithmetic and launches; fitted to measurements, see docs/limits.md."""

    hidden: float  # share of the shorter of copies and computing that overlaps with the longer
    launch: float  # launch overhead of a decoder layer, as a multiple of plain transformers'
    launch_routed: float = 0.0  # added to it for a layer's routed experts
    choice: float = 0.0  # in a recorded step: to read a layer's router and go on, as the same multiple
    fetch: float = 0.0  # added to it where the layer's experts are not all on the device
    copy_s: float = 0.0  # between the copies of two experts
    stall: float  # time of a layer in which neither PCIe nor the device works, as the same multiple
    small_s: float = 0.0  # of a recorded layer: its small operations, which follow each other
    small_routed_s: float = 0.0  # added to it with routed experts
    packed: float = 1.0  # time to multiply a packed weight with one token, as a multiple of the time to expand it
    expand: float = 1.0  # time to expand quantized weights, as a multiple of the stream engine's
    copies: float = 0.0  # how often a pass copies all weights within the device's memory
    load_s: float = 2.0  # part of the loading time that does not depend on the model's size
    load_s_per_parameter: float = 0.0  # to create or convert one
    load_s_per_quantized: float = 0.0  # to quantize one
    pinning: float = 1.0  # pinning rate while loading, as a multiple of the measured rate of one block at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """How an engine stores and moves the weights of a plan, in bytes over all ranks unless noted."""

    placement: Placement
    copied_bytes: int = 0  # copies of weights that every rank holds, on all ranks but the first
    expanded_numel: int = 0  # quantized weights that are kept expanded, in 16 bits
    streamed_bytes_per_pass: int  # from host memory to the devices
    ready_bytes: int = 0  # part of that which may be on the devices already when a prefill begins
    read_ahead_bytes: int = 0  # of a prefill's reads from disk, those that may be done when it begins
    # what is copied in a decode step that copies only the experts that tokens are routed to, or not the layers that the
    # host computes; None: as in every pass
    streamed_bytes_per_step: int | None = None
    # read from disk in a decode step that reads only such experts; None: as in every pass
    disk_bytes_per_step: int | None = None
    own_bytes_per_step: int = 0  # part of both: weights that are not experts, which do not fit on the GPU
    routes: bool = False  # True if decode steps copy and expand only the experts that tokens are routed to
    packed_tokens: int = 0  # up to so many tokens in a pass, resident weights are multiplied without being expanded
    can_compute_on_host: bool = False  # True if the host's cores can compute decode steps of layers
    host_layers: tuple[int, ...] = ()  # layers whose decode steps the host's cores compute, by number
    can_compute_experts_on_host: bool = False  # True if the cores can compute experts that are not on the device
    host_experts: float = 0.0  # share of the host's cores in the work of experts that are not on the device
    host_bytes_per_step: int = 0  # of experts that the cores compute in a decode step, if routing spreads evenly
    host_kv_bytes: int = 0  # part of the KV cache that is in host memory because the host computes its layers
    expert_bytes: int = 0  # of one of the experts that are copied or read alone
    experts_together: int = 1  # so many are copied before the first of them is computed
    recorded: bool = False  # True if the operations of a decode step are launched at once
    each_machine_has_all: bool = False  # True if each machine holds all weights outside GPUs; False: each has a part
    gathered_bytes: int = 0  # of weights: what each GPU receives from others in a pass
    host_buffer_bytes: int = 0  # between disk and device
    host_cached_bytes: int = 0  # part of these: experts whose weights are on disk
    gpu_buffer_bytes: int = 0  # on each GPU: for weights that are copied or expanded
    cached_bytes: int = 0  # part of the GPU buffers: experts that may be given up at any time
    parked_bytes: int = 0  # of each GPU's weights: moved to host memory while the reference needs the space
    pinnable: bool = True  # True if the engine can keep weights in pinned host memory
    pins_by_default: bool = True  # True if it pins them when `offload.pin_memory` is null
    locked_bytes: int = 0  # part of the host buffers that the process itself locks in memory
    notes: tuple[str, ...] = ()  # on how the engine runs the model
    overlap: Overlap

    @property
    def uses_host(self) -> bool:
        """Whether the host's cores compute layers or experts in decode steps."""
        return bool(self.host_layers) or self.host_experts > 0


@dataclass(frozen=True, kw_only=True)
class Plan(Spec):  # a subclass: everything known before the engine places the weights is also known afterwards
    """Everything that is decided before the model is loaded."""

    storage: Storage
    pin_memory: bool

    @property
    def weight_bytes(self) -> int:
        """All weights as the engine stores them, each counted once."""
        return self.placement.total_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """What is done differently from the model's configuration, and how the engine runs the model."""
        return self.architecture.notes + self.storage.notes

    @property
    def placement(self) -> Placement:
        return self.storage.placement

    @property
    def streamed_bytes_per_pass(self) -> int:
        """Bytes of weights copied from host memory to the device in one forward pass, over all ranks."""
        return self.storage.streamed_bytes_per_pass

    @property
    def link_bytes_per_pass(self) -> int:
        """Bytes copied at least from host memory to the device in a decode step, over all ranks: weights and KV cache."""
        on_gpu = 1 - len(self.storage.host_layers) / self.architecture.num_layers
        return self.streamed_bytes_per_step + round(on_gpu * self.kv_link_bytes_per_pass)

    @property
    def streamed_bytes_per_step(self) -> int:
        """Bytes of weights copied from host memory to the device in a decode step, over all ranks.

        With routed experts, it is what tokens need whose experts are drawn evenly.
        """
        step = self.storage.streamed_bytes_per_step
        return self.streamed_bytes_per_pass if step is None else step

    @property
    def disk_bytes_per_pass(self) -> int:
        """Bytes of weights read from disk in a prefill, over all ranks: those that host memory does not have as well."""
        # slots are as large as the largest expert, so the last of them may count for more than there is
        return max(0, self.placement.nvme_bytes - self.storage.host_cached_bytes)

    @property
    def disk_bytes_per_step(self) -> int:
        """Bytes of weights read from disk in a decode step, over all ranks; with routed experts as above."""
        step = self.storage.disk_bytes_per_step
        return self.disk_bytes_per_pass if step is None else step

    @property
    def draws_experts(self) -> bool:
        """Whether a decode step brings what depends on the experts that tokens are routed to."""
        return self.storage.streamed_bytes_per_step is not None or self.storage.disk_bytes_per_step is not None

    def of_one_machine(self, nbytes: int) -> int:
        """Return the part of weights outside GPUs, in bytes, that one machine holds."""
        return nbytes if self.storage.each_machine_has_all else -(-nbytes // self.run.launch.nnodes)

    @property
    def packed_fraction(self) -> float:
        """Share of the model's parameters that are stored as integers: quantized and not kept expanded."""
        return (self.quantized_numel - self.storage.expanded_numel) / self.architecture.num_parameters

    @property
    def bits_per_weight(self) -> float:
        """Average bits per stored parameter, including scales, minima and parameters that are not quantized."""
        return 8 * self.weight_bytes / self.architecture.num_parameters
