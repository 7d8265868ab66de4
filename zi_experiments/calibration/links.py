"""Rates of several GPUs of one machine at the same time: of their PCIe connections, and of what they gather."""

from collections.abc import Callable
from typing import Any

import torch

from zi_experiments.calibration.rates import COPY_BYTES
from zi_experiments.runtime.pinned_memory import host_empty

_MOMENTS = 6
_CALLS = 16  # at a moment: a sixth of a second over PCIe 5


def measure(gpus: int, *, peers: bool) -> tuple[dict[str, Any], list[str]]:
    """Return figures of that many GPUs by their names in `Ceilings` and `Machine`, and notes on missing ones.

    Each PCIe connection has this rate while all of them are busy: host memory may not be as fast as all together. With
    `peers` the GPUs gather over links of their own. Raises torch's errors, such as out of memory.
    """
    devices, notes, peer = [torch.device("cuda", number) for number in range(gpus)], list[str](), None
    there = [torch.empty(COPY_BYTES, dtype=torch.uint8, device=device) for device in devices]
    host = []
    for device in devices:
        with torch.cuda.device(device):
            host.append(host_empty(COPY_BYTES, torch.uint8, pinned=True))

    def copy() -> None:
        for target, source in zip(there, host, strict=True):
            target.copy_(source, non_blocking=True)

    moments = [COPY_BYTES / _seconds(copy, devices) for _ in range(_MOMENTS)]
    if peers:
        share = COPY_BYTES // gpus
        shares, wholes = [each[:share].clone() for each in there], [each[: gpus * share] for each in there]
        try:
            peer = (gpus - 1) * share / _seconds(lambda: torch.cuda.nccl.all_gather(shares, wholes), devices)
        except RuntimeError as error:
            notes.append(f"what the GPUs gather was not measured ({error})")
    figures = {"link_bytes_per_s": max(moments), "peer_bytes_per_s": peer, "moments": {"link_bytes_per_s": moments}}
    return figures, notes


def _seconds(work: Callable[[], None], devices: list[torch.device]) -> float:
    """Return the seconds of one call, after a first one, on the GPU that takes longest."""
    work()
    for device in devices:
        torch.cuda.synchronize(device)
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in devices] for _ in range(2))  # type: ignore[no-untyped-call]
    _record(starts, devices)
    for _ in range(_CALLS):
        work()
    _record(ends, devices)
    for end in ends:
        end.synchronize()
    longest_ms = max(float(start.elapsed_time(end)) for start, end in zip(starts, ends, strict=True))
    return longest_ms / 1e3 / _CALLS


def _record(events: list[Any], devices: list[torch.device]) -> None:
    for event, device in zip(events, devices, strict=True):
        event.record(torch.cuda.current_stream(device))
