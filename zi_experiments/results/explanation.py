"""Sentences that explain the speed of a run."""

from zi_experiments.cost_model.bound import is_published, lower_bound, rate
from zi_experiments.cost_model.machine_bound import machine_bound_s
from zi_experiments.cost_model.plan import Plan
from zi_experiments.cost_model.prediction import Prediction
from zi_experiments.planner.search import Candidate, Pace
from zi_experiments.results.metrics import Metrics, Passed
from zi_experiments.system.machines import HERE
from zi_experiments.units import scaled, seconds

_VERBS = {
    "link": "decode streams {amount} per step over a {rate} link",
    "disk": "decode reads {amount} per step from a {rate} disk",
    "hbm": "decode reads {amount} per step from {rate} memory",
    "gemm": "decode computes {amount} per step at {rate}",
    "host": "the host's cores read {amount} per step at {rate}",
    "memory": "cores and link read {amount} per step from {rate} host memory",
}
LIMITS = {
    "link": "PCIe",
    "disk": "the disk",
    "hbm": "the memory of the device",
    "gemm": "matrix products",
    "launch": "launching operations",
    "host": "the host's cores",
    "memory": "host memory",
}
EQUAL = 0.995  # bounds whose ratio is nearer to 1 read alike
VENDORS = " (vendor's rates)"


def unknown(plan: Plan) -> str | None:
    """Return what to type so that the bound is known; None if it is known."""
    missing = lower_bound(plan).unknown
    if not missing:
        return None
    keys = " ".join(f"hardware.ceilings.{name}=…" for name in missing)
    path = " --path FOLDER" if "disk_bytes_per_s" in missing else ""
    return (
        f"no estimate of time, since {', '.join(missing)} of this machine {'is' if len(missing) == 1 else 'are'} "
        f"not known: pass {keys}, or measure it with python -m zi_experiments.hardware{path}"
    )


def least(plan: Plan, value_s: float, limit: str | None) -> str:
    """Return a bound as text, marked if it is from a data sheet."""
    return seconds(value_s) + (VENDORS if is_published(plan, limit) else "")


def predicted(time_s: float | None, error: float) -> str:
    """Return a predicted time as text, with its error: predicted / measured − 1."""
    assert time_s is not None
    if error >= 1:
        return f"{seconds(time_s)} ({1 + error:.1f} × too high)"
    percent = round(100 * abs(error))
    return seconds(time_s) + (f" ({percent} % too {'high' if error > 0 else 'low'})" if percent else "")


def gain(better: Candidate, now: Pace) -> str:
    """Return what a change gains, and what it costs in latency, as text."""
    by = "" if better.pace.is_predicted else " (by the lower bounds)"
    return (
        f"faster{by}: {better.text}, {better.tok_per_s / now.tok_per_s:.2f} × the tokens per second; "
        f"first token after {seconds(now.ttft_s)} → {seconds(better.pace.ttft_s)}, "
        f"then one each {seconds(now.tpot_s)} → {seconds(better.pace.tpot_s)}"
    )


def passed(beyond: Passed, plan: Plan, metrics: Metrics) -> str:
    """Return a sentence: by how much a run was faster than its bound, and what was done about it."""
    chosen = plan.run.hardware.name
    now = {"prefill": metrics.prefill_fraction_of_bound, "decode": metrics.fraction_of_bound}
    fractions = " and ".join(f"{name} by {100 * (fraction - 1):.0f} %" for name, fraction in beyond.items())
    then = "the machine was measured again" if chosen in HERE else f"the rates of hardware={chosen} are too low"
    text = f"the run was faster than its lower bound ({fractions}), so the bound was wrong and {then}: "
    return text + " and ".join(
        f"{name} reaches {100 * fraction:.0f} % of the new one"
        if (fraction := now[name])
        else f"{name} has no bound now"
        for name in beyond
    )


def sentence(plan: Plan, prediction: Prediction, metrics: Metrics) -> str | None:
    """Return a decode step's least work and its time as a sentence; None without a ceiling or with a wrong bound."""
    bound, measured_s = lower_bound(plan), metrics.tpot_p50_s
    if bound.decode_step_s is None or bound.limited_by is None or measured_s is None:
        return None
    if metrics.fraction_of_bound is None:  # the run has passed it
        return None
    text = f"{_work(plan, bound.limited_by, bound.decode_step_s)}: at least {seconds(bound.decode_step_s)}"
    text += f"; measured {seconds(measured_s)} ({100 * bound.decode_step_s / measured_s:.0f} %)"
    if least_s := over_all_placements(plan):
        text += (
            f"; over all placements on this machine at least {seconds(least_s)} ({100 * least_s / measured_s:.0f} %)"
        )
    # products of few rows read weights as well, which the bound counts as memory
    same = {bound.limited_by} if bound.limited_by != "hbm" else {"hbm", "gemm"}
    if prediction.limited_by is None or prediction.limited_by in same:
        return text
    return f"{text}. The prediction spends most of it on {LIMITS[prediction.limited_by]}"


def over_all_placements(plan: Plan) -> float | None:
    """Return the machine's bound of a decode step in seconds; None if unknown, or no lower than that of this placement."""
    placed_s, machine_s = lower_bound(plan).decode_step_s, machine_bound_s(plan)
    return machine_s if machine_s and placed_s and machine_s < EQUAL * placed_s else None


def _work(plan: Plan, limit: str, bound_s: float) -> str:
    best = rate(plan, limit)
    assert best is not None
    unit = "FLOP" if limit == "gemm" else "B"
    return _VERBS[limit].format(amount=scaled(bound_s * best, unit), rate=scaled(best, f"{unit}/s"))
