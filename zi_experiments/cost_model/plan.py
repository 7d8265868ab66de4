"""The plan of a run: what is stored where, and what crosses the link. Pure figures; nothing is decided here."""

from collections import Counter
from dataclasses import dataclass

from zi_experiments.cost_model.inventory import Home, Stored
from zi_experiments.cost_model.spec import ELEMENT_BYTES, Spec


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
    pins_by_default: bool = True  # whether it does unless `offload.pin_memory` says otherwise
    locked_bytes: int = 0  # of the host's buffers, those that the process locks in memory itself
    overlap: Overlap


@dataclass(frozen=True, kw_only=True)
class Plan(Spec):  # and not beside one: what is known before an engine has placed the weights is known afterwards
    """Everything that is decided before anything is loaded."""

    storage: Storage
    pin_memory: bool

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
    def link_bytes_per_pass(self) -> int:
        """Bytes that have to cross from host memory to the device in a decode step, over all ranks."""
        return self.streamed_bytes_per_pass + self.kv_link_bytes_per_pass

    @property
    def packed_fraction(self) -> float:
        """Share of the model's parameters that are stored as integers: what is quantized and not kept expanded."""
        return (self.quantized_numel - self.storage.expanded_numel) / self.architecture.num_parameters

    @property
    def bits_per_weight(self) -> float:
        """Bits that a parameter takes on average as stored: scales, minima and what is not quantized included."""
        return 8 * self.weight_bytes / self.architecture.num_parameters
