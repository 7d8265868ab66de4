"""Why a run was as fast as it was, in a sentence."""

from zi_experiments.metrics import Metrics
from zi_experiments.plan import Plan
from zi_experiments.predict import predict
from zi_experiments.units import scaled, seconds

_VERBS = {
    "link": "decode streams {amount} per step over a {rate} link",
    "disk": "decode reads {amount} per step from a {rate} disk",
    "hbm": "decode reads {amount} per step from {rate} memory",
    "gemm": "decode multiplies for {amount} per step at {rate}",
}
LIMITS = {
    "link": "the link",
    "disk": "the disk",
    "hbm": "the memory of the device",
    "gemm": "matrix products",
    "launch": "the launch of kernels",
}


def sentence(plan: Plan, metrics: Metrics) -> str | None:
    """What a decode step had to do at least, and what it took; None where no ceiling is known."""
    bound, measured_s = plan.bound, metrics.tpot_p50_s
    if bound.decode_step_s is None or bound.limited_by is None or measured_s is None:
        return None
    text = f"{_work(plan, bound.limited_by, bound.decode_step_s)}: at least {seconds(bound.decode_step_s)}"
    text += f"; measured {seconds(measured_s)} ({100 * bound.decode_step_s / measured_s:.0f} %)"
    predicted = predict(plan)
    # products of few rows read weights as well: those that the bound counts as memory
    same = {bound.limited_by} if bound.limited_by != "hbm" else {"hbm", "gemm"}
    if predicted.limited_by is None or predicted.limited_by in same:
        return text
    return f"{text}. By plan most of it is taken by {LIMITS[predicted.limited_by]}"


def _work(plan: Plan, limit: str, bound_s: float) -> str:
    rates, ranks = plan.machine.ceilings, plan.run.hardware.num_gpus
    rate = {
        "link": rates.link_bytes_per_s,
        "disk": rates.disk_bytes_per_s,
        "hbm": rates.hbm_bytes_per_s,
        "gemm": rates.flops,
    }[limit]
    assert rate is not None
    everywhere = rate if limit == "disk" else ranks * rate
    unit = "FLOP" if limit == "gemm" else "B"
    return _VERBS[limit].format(amount=scaled(bound_s * everywhere, unit), rate=scaled(everywhere, f"{unit}/s"))
