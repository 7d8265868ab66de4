"""Which passes bring only the experts that tokens are routed to, and how many experts stay on the device. Figures only."""

from collections.abc import Sequence
from math import ceil

from zi_experiments.config.schema import OffloadDevice
from zi_experiments.cost_model.spec import VERIFIED_SEQUENCES, Spec
from zi_experiments.engines.stream.slab import Layout, Stack

COPIED_TOGETHER = 64 << 20  # bytes that are worth waiting for: fewer take less time than launching their operations
WORTHWHILE = 0.85  # share of a layer's experts above which whole layers, copied ahead of the compute, are faster
WORTHWHILE_FROM_DISK = 0.97  # the same of a disk, where the time between layers takes a smaller share of a step


def obstacle(spec: Spec) -> str | None:
    """Return why decode steps bring all experts, in words; None if they are faster with routed experts only."""
    run = spec.run
    if not spec.experts:
        return "transformers computes this model's experts without its interface for them"
    if run.hardware.num_gpus > 1:
        return "experts are brought one by one with one GPU only"
    needed = spec.distinct_experts(run.workload.batch_size)
    worthwhile = WORTHWHILE_FROM_DISK if run.offload.device is OffloadDevice.nvme else WORTHWHILE
    if needed > worthwhile * spec.experts:
        return f"{run.workload.batch_size} sequences need about {needed:.0f} of {spec.experts}"
    return None


def pays(spec: Spec) -> bool:
    """Return whether decode steps are faster if they bring routed experts only."""
    return obstacle(spec) is None


def most_tokens(spec: Spec) -> int:
    """Return the most tokens, over all sequences, of a pass that is routed: those of a decode step."""
    return max(spec.run.workload.sequences, VERIFIED_SEQUENCES)


def least_slots(spec: Spec) -> int:
    """Return the most experts of a layer that a routed pass of the run needs."""
    return min(spec.experts, most_tokens(spec) * spec.routed_experts)


def at_once(spec: Spec, expert_bytes: int) -> int:
    """Return the most experts that are computed at a time: in 16 bits few, since they are gathered in a buffer."""
    most = least_slots(spec)
    return most if spec.experts_are_quantized else min(most, max(1, COPIED_TOGETHER // expert_bytes))


def together(expert_bytes: int) -> int:
    """Return how many experts are copied before the first of them is computed."""
    return max(1, -(-COPIED_TOGETHER // expert_bytes))


def stacks(layouts: Sequence[Layout]) -> list[Stack]:
    return [layout.experts for layout in layouts if layout.experts]


def slots(spec: Spec, streamed: Sequence[Layout], room_bytes: int) -> int:
    """Return the number of experts that fit in `room_bytes` of the device: enough for a layer's, at most all."""
    found = stacks(streamed)
    if not found:
        return 0
    return min(sum(stack.count for stack in found), max(least_slots(spec), room_bytes // slot_bytes(streamed)))


def slot_bytes(streamed: Sequence[Layout]) -> int:
    return max((stack.each.nbytes for stack in stacks(streamed)), default=0)


def per_step(spec: Spec, streamed: Sequence[Layout], *held: int) -> int:
    """Return the bytes of experts that a decode step copies if routing spreads evenly, behind so many slots.

    Each expert is in one memory only.
    """
    return ceil(missed(spec, streamed, *held) * sum(stack.each.nbytes for stack in stacks(streamed)))


def missed(spec: Spec, streamed: Sequence[Layout], *held: int) -> float:
    """Return how many experts of a layer a decode step does not find in so many slots, if routing spreads evenly."""
    count = sum(stack.count for stack in stacks(streamed))
    # a layer's share of the slots is of use from one step to the next if it is more than what the step itself needs
    kept = min(1.0, sum(slots / count for slots in held if slots > least_slots(spec)))
    return (1 - kept) * spec.distinct_experts(spec.run.workload.sequences)
