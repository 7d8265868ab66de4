"""How the ranks of a machine bring slabs: each its share and an all-gather, or each the whole slab. Figures only."""

from collections.abc import Iterator

from zi_experiments.config.schema import OffloadDevice
from zi_experiments.cost_model.spec import Spec


def gathers(spec: Spec) -> bool:
    """Return whether each rank brings a share of every slab, which an all-gather makes whole.

    Otherwise each brings whole slabs for its own prompts, from host memory that the ranks of a machine share. That takes as
    long as to gather over PCIe. What is on disk is gathered, so that it is read once.
    """
    if spec.ranks_each == 1:
        return False
    if spec.run.offload.device is OffloadDevice.nvme:
        return True
    peer, link = spec.machine.peer_bytes_per_s, spec.machine.ceilings.link_bytes_per_s
    return peer is not None and (link is None or peer * spec.ranks_each > link * (spec.ranks_each - 1))


def share_slots(spec: Spec) -> int:
    """Return the number of slots for this rank's shares of slabs, which are gathered from there; 0 if none are.

    One is being gathered and one is being filled. Unless memory is scarce, as many as make a slab are ready: they cross
    while the host waits for a token.
    """
    if not gathers(spec):
        return 0
    return 2 if spec.run.offload.resident == "auto" else 1 + spec.ranks_each


def notes(spec: Spec) -> Iterator[str]:
    """Yield how several GPUs bring weights, and why."""
    if spec.machine.device == "cpu" or spec.run.hardware.num_gpus == 1:
        return
    peer = spec.machine.peer_bytes_per_s
    machine = "" if spec.run.launch.nnodes == 1 else "; each machine brings all weights for its own prompts"
    if gathers(spec) and peer is not None:
        yield f"each GPU brings 1/{spec.ranks_each} of the weights, gathered at {peer / 1e9:.0f} GB/s{machine}"
    elif gathers(spec):
        yield f"each GPU brings 1/{spec.ranks_each} of the weights, gathered over PCIe: the disk is read once{machine}"
    elif spec.ranks_each > 1:
        why = "no links between the GPUs are known" if peer is None else "the links between the GPUs are slow"
        yield f"each GPU brings all weights for its own prompts, since {why} (hardware.peer_bytes_per_s){machine}"
    else:
        yield machine.removeprefix("; ")
