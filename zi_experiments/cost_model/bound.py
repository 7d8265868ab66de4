"""The lower bound on the time of a plan, from the machine's peak rates (roofline model)."""

from dataclasses import dataclass

from zi_experiments.cost_model.plan import Plan
from zi_experiments.cost_model.spec import ELEMENT_BYTES

RATES = {
    "link": "link_bytes_per_s",
    "disk": "disk_bytes_per_s",
    "hbm": "hbm_bytes_per_s",
    "gemm": "flops",
    "memory": "host_memory_bytes_per_s",
}  # resources that bound a pass: the names of their rates in `hardware.ceilings`
PUBLISHED = "published"  # prefix of the source of a vendor's rates


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """Times that no run of this plan can beat; None where a rate that they depend on is unknown."""

    prefill_s: float | None
    decode_step_s: float | None
    prefill_limited_by: str | None
    limited_by: str | None  # bottleneck of a decode step: "link", "disk", "hbm", "gemm", "host" or "memory"
    unknown: tuple[str, ...]  # missing rates, by their names in `hardware.ceilings`


def lower_bound(plan: Plan) -> Bound:
    """Return the plan's lower bound on time. Source: the roofline model, extended by link (PCIe) and disk.

    A pass takes at least streamed bytes / link, disk bytes / disk rate, weights / HBM (in a decode step with the KV cache),
    and operations / arithmetic. Streamed are weights and, in a decode step, a KV cache in host memory: at least the prompt's.
    What a ring has brought ahead when a prefill begins need not come in it; of a decode step the next one's comes instead.
    Operations are 2 · parameters · tokens, plus 2 · B · P² · h · L for causal attention in prefill. Only weights that a
    token uses count: those of the decoder layers, and of experts those that one token is routed to. What the host computes
    in a decode step takes at least its bytes / the rate at which the cores read memory, and with what crosses the link the
    rate at which both read it together; without these rates it does not count.
    """
    read = step_bytes(plan)
    layers_on_host = len(plan.storage.host_layers) / plan.architecture.num_layers
    host_bytes = layers_on_host * read + plan.storage.host_bytes_per_step
    on_host = min(1.0, host_bytes / read)
    decode: dict[str, float] = {
        "link": plan.link_bytes_per_pass,
        "disk": plan.disk_bytes_per_step,
        "hbm": (1 - on_host) * read,
        # cores are taken to compute as fast as GPUs
        "gemm": max(layers_on_host, 1 - on_host) * step_flops(plan),
    }
    if on_host and rate(plan, "host"):
        decode["host"] = host_bytes
    if on_host and rate(plan, "memory"):
        decode["memory"] = host_bytes + plan.link_bytes_per_pass
    prefill: dict[str, float] = {
        "link": max(0, plan.streamed_bytes_per_pass - plan.storage.ready_bytes),
        "disk": max(0, plan.disk_bytes_per_pass - plan.storage.read_ahead_bytes),
        "hbm": ELEMENT_BYTES * plan.active(plan.stored_numel),
        "gemm": prefill_flops(plan),
    }
    prefill_limited_by, prefill_s = _longest(plan, prefill)
    limited_by, decode_step_s = _longest(plan, decode)
    return Bound(
        prefill_s=prefill_s,
        decode_step_s=decode_step_s,
        prefill_limited_by=prefill_limited_by,
        limited_by=limited_by,
        unknown=_unknown(plan, decode | prefill),
    )


def step_bytes(plan: Plan) -> float:
    """Return the bytes that a decode step reads: the weights that one token uses, and the prompt's KV cache."""
    work = plan.run.workload
    kv = work.sequences * plan.architecture.kv_elements(work.prompt_len)
    return ELEMENT_BYTES * (plan.active(plan.stored_numel) + kv)


def step_flops(plan: Plan) -> float:
    """Return the operations of a decode step of all sequences."""
    return 2 * plan.active(lambda p: p.numel) * plan.run.workload.sequences


def prefill_flops(plan: Plan) -> float:
    """Return the operations of the prefill of all sequences: products, and causal attention."""
    work, arch = plan.run.workload, plan.architecture
    attention = 2 * work.sequences * work.prompt_len**2 * arch.hidden_size * arch.num_layers
    return step_flops(plan) * work.prompt_len + attention


def rate(plan: Plan, limit: str) -> float | None:
    """Return the peak rate of a resource in `RATES`, summed over all devices; None if unknown.

    The devices of a machine share its disk and host memory, and machines that hold all weights read the same from each disk.
    Also that of "host", at which the cores read memory.
    """
    known = plan.machine.calibration
    if limit == "host":
        cores = known.host_read_bytes_per_s if known and plan.machine.device == "cuda" else None
        return cores and cores * plan.run.launch.nnodes
    each: float | None = getattr(plan.machine.ceilings, RATES[limit])
    if limit == "gemm" and known and (moments := (known.moments or {}).get(plan.dtype)):
        each = max((*moments, *known.gemm_flops.get(plan.dtype, {}).values()))  # the ceiling may be another type's
    machines = plan.run.launch.nnodes
    shared = {"disk": 1 if plan.storage.each_machine_has_all else machines, "memory": machines}
    return each and each * shared.get(limit, plan.run.hardware.num_gpus)


def is_published(plan: Plan, limit: str | None) -> bool:
    """Return whether the rate is from a vendor's data sheet, which never covers the disk."""
    return limit not in (None, "disk", "host", "memory") and (plan.machine.ceilings.source or "").startswith(PUBLISHED)


def _longest(plan: Plan, amounts: dict[str, float]) -> tuple[str, float] | tuple[None, None]:
    """Return the resource that takes longest in a pass, and its seconds; None if a rate is unknown."""
    if _unknown(plan, amounts):
        return None, None
    seconds = {name: amount / known for name, amount in amounts.items() if (known := rate(plan, name))}
    name = max(seconds, key=lambda each: seconds[each])
    return name, seconds[name]


def _unknown(plan: Plan, amounts: dict[str, float]) -> tuple[str, ...]:
    return tuple(RATES[name] for name, amount in amounts.items() if amount and not rate(plan, name))
