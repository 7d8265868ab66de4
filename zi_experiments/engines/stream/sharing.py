"""How ranks bring slabs: each its share and an all-gather, or each the whole slab. Figures only."""

from collections.abc import Iterator

from zi_experiments.config.schema import OffloadDevice
from zi_experiments.cost_model.spec import ELEMENT_BYTES, Spec

ROOM = 0.8  # share of a machine's memory that all weights may take, if each machine is to hold them


def sharers(spec: Spec) -> int:
    """Return how many consecutive ranks hold the weights together: those of a machine, or all if a machine has no room."""
    disk = spec.run.offload.device is OffloadDevice.nvme
    room = spec.machine.disk_free_bytes if disk else spec.machine.host_memory_bytes
    weights = ELEMENT_BYTES * sum(spec.stored_numel(p) for p in spec.architecture.parameters if p.layer is not None)
    return spec.ranks_each if room is None or weights <= ROOM * room else spec.run.hardware.num_gpus


def gathers(spec: Spec) -> bool:
    """Return whether each rank brings a share of every slab, which an all-gather makes whole.

    Otherwise each brings whole slabs for its own prompts, from host memory that the ranks of a machine share. That takes as
    long as to gather over PCIe. What is on disk is gathered, so that it is read once.
    """
    if sharers(spec) == 1:
        return False
    if sharers(spec) > spec.ranks_each or spec.run.offload.device is OffloadDevice.nvme:
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
    return 2 if spec.run.offload.resident == "auto" else 1 + sharers(spec)


def notes(spec: Spec) -> Iterator[str]:
    """Yield how several GPUs bring weights, and why."""
    if spec.machine.device == "cpu" or spec.run.hardware.num_gpus == 1:
        return
    peer, share = spec.machine.peer_bytes_per_s, f"each GPU brings 1/{sharers(spec)} of the weights, gathered"
    machine = "" if spec.run.launch.nnodes == 1 else "; each machine brings all weights for its own prompts"
    if sharers(spec) > spec.ranks_each:
        yield f"{share} over the network between the machines: one alone has no room for all"
    elif gathers(spec) and peer is not None:
        yield f"{share} at {peer / 1e9:.0f} GB/s{machine}"
    elif gathers(spec):
        yield f"{share} over PCIe: the disk is read once{machine}"
    elif spec.ranks_each > 1:
        why = "no links between the GPUs are known" if peer is None else "the links between the GPUs are slow"
        yield f"each GPU brings all weights for its own prompts, since {why} (hardware.peer_bytes_per_s){machine}"
    else:
        yield machine.removeprefix("; ")
