"""The lower bound on the time of a plan, from what the machine can do at best."""

from dataclasses import dataclass

from zi_experiments.cost_model.plan import Plan
from zi_experiments.cost_model.spec import ELEMENT_BYTES

RATES = {
    "link": "link_bytes_per_s",
    "disk": "disk_bytes_per_s",
    "hbm": "hbm_bytes_per_s",
    "gemm": "flops",
}  # that bound a pass, by their names in `hardware.ceilings`
PUBLISHED = "published"  # how the source of a vendor's rates begins


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """No run of this plan can be faster; None where a rate is not known that it depends on."""

    prefill_s: float | None
    decode_step_s: float | None
    prefill_limited_by: str | None
    limited_by: str | None  # what bounds a decode step: "link", "disk", "hbm" or "gemm"
    unknown: tuple[str, ...]  # the rates that are missing, by their names in `hardware.ceilings`


def lower_bound(plan: Plan) -> Bound:
    """The plan's lower bound on time. Sources: the roofline model, with a link and a disk beside memory and arithmetic.

    A pass takes at least streamed bytes / link, disk bytes / disk rate, and weights + KV cache / HBM; streamed
    are weights, and in a decode step a KV cache that lives in host memory, that of the prompt at least;
    arithmetic takes 2 · parameters · tokens, plus 2 · B · P² · h · L for causal attention in prefill. Weights that
    meet a token are those of the decoder layers, and of experts those that one token is routed to.
    """
    work, arch = plan.run.workload, plan.architecture
    traffic: dict[str, float] = {"link": plan.streamed_bytes_per_pass, "disk": plan.placement.nvme_bytes}
    kv = ELEMENT_BYTES * work.sequences * arch.kv_elements(work.prompt_len)
    flops_per_token = 2 * plan.active(lambda p: p.numel)
    decode = traffic | {
        "link": plan.link_bytes_per_pass,
        "hbm": ELEMENT_BYTES * plan.active(plan.stored_numel) + kv,
        "gemm": flops_per_token * work.sequences,
    }
    attention = 2 * work.sequences * work.prompt_len**2 * arch.hidden_size * arch.num_layers
    prefill = traffic | {"gemm": flops_per_token * work.sequences * work.prompt_len + attention}
    prefill_limited_by, prefill_s = _longest(plan, prefill)
    limited_by, decode_step_s = _longest(plan, decode)
    return Bound(
        prefill_s=prefill_s,
        decode_step_s=decode_step_s,
        prefill_limited_by=prefill_limited_by,
        limited_by=limited_by,
        unknown=_unknown(plan, decode | prefill),
    )


def rate(plan: Plan, limit: str) -> float | None:
    """What bounds a pass, at best and on all devices together, which share the disk; None: unknown."""
    known = plan.machine.calibration
    each: float | None = getattr(plan.machine.ceilings, RATES[limit])
    if limit == "gemm" and known and (moments := (known.moments or {}).get(plan.dtype)):
        each = max((*moments, *known.gemm_flops.get(plan.dtype, {}).values()))  # another type may be faster
    return each and each * (1 if limit == "disk" else plan.run.hardware.num_gpus)


def is_published(plan: Plan, limit: str | None) -> bool:
    """Whether the rate is from a vendor's data sheet; no such sheet knows the disk."""
    return limit not in (None, "disk") and (plan.machine.ceilings.source or "").startswith(PUBLISHED)


def _longest(plan: Plan, amounts: dict[str, float]) -> tuple[str, float] | tuple[None, None]:
    """What of a pass takes longest, and how long; None where that depends on an unknown rate."""
    if _unknown(plan, amounts):
        return None, None
    seconds = {name: amount / known for name, amount in amounts.items() if (known := rate(plan, name))}
    name = max(seconds, key=lambda each: seconds[each])
    return name, seconds[name]


def _unknown(plan: Plan, amounts: dict[str, float]) -> tuple[str, ...]:
    return tuple(RATES[name] for name, amount in amounts.items() if amount and not rate(plan, name))
