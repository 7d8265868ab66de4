"""`Samples + Plan → Metrics`: a pure function; every figure has its definition here."""

from dataclasses import dataclass, fields, replace
from functools import reduce
from statistics import median, quantiles

from zi_experiments.config import errors
from zi_experiments.config.schema import ConfigError, Run
from zi_experiments.cost_model.bound import lower_bound
from zi_experiments.cost_model.machine_bound import machine_bound_s
from zi_experiments.cost_model.plan import Plan
from zi_experiments.cost_model.prediction import Prediction, cost_per_million_tokens, predict
from zi_experiments.engines.base import Routed
from zi_experiments.measurement.timing import Pass, Samples

NOISE = 1.03  # a fraction of a bound below this is within the noise of measurements
Passed = dict[str, float]  # by "prefill" and "decode": the fraction of a bound that was wrong


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """Figures of a run: medians over its measured passes. B sequences, P prompt tokens, G generated tokens each."""

    prefill_tok_per_s: float  # B·P / ttft_s
    decode_tok_per_s: float | None  # B·(G−1) / (total_s − ttft_s); None when G is 1
    total_tok_per_s: float  # B·G / total_s
    ttft_s: float  # from the call of generate to the first token being known on the host
    tpot_p50_s: float | None  # from one token to the next, over the decode steps of all passes
    tpot_p90_s: float | None
    tpot_p99_s: float | None
    tok_per_s_per_user: float | None  # decode tokens per second of one sequence: 1 / tpot_p50_s
    load_s: float
    gpu_peak_bytes: int  # allocated on one GPU while measuring, the largest over ranks
    host_peak_bytes: int  # resident in all processes of the run, at any time
    disk_peak_bytes: int  # in the run's folder on offload.path, at any time
    link_bytes_per_s: float | None  # bytes that had to cross PCIe in one pass / median decode step
    disk_bytes_per_s: float | None  # bytes that had to be read from disk in one pass / median decode step
    experts_per_layer: float | None  # distinct routed experts of a layer in a decode step; None if all are brought
    experts_per_layer_on_host: float | None  # of these, the ones that the host computes; None if it computes none
    expert_hit_rate: float | None  # share of them that was on the device; None if none is ever copied alone
    expert_host_hit_rate: (
        float | None
    )  # share of those not on the device that was in host memory; None if none is on disk
    fraction_of_bound: float | None  # lower bound of a decode step / median decode step
    prefill_fraction_of_bound: float | None
    fraction_of_machine_bound: float | None  # the same of a decode step, over all placements on this machine
    prefill_prediction_error: float | None  # predicted / measured − 1, of ttft_s
    decode_prediction_error: float | None  # predicted / measured − 1, of the median decode step
    perplexity: float | None  # of the weights on workload.text; None without a text
    kl_divergence: float | None  # from 16 bits, in nats for each token of workload.text; None without a text
    # energy of all measured passes / their generated tokens; None where a counter cannot be read, or did not move
    gpu_joules_per_token: float | None  # of all GPUs of the run
    cpu_joules_per_token: float | None  # of all processors of the host
    dram_joules_per_token: float | None  # of the memory of these processors
    cost_per_million_tokens: (
        float | None
    )  # nnodes · price_per_hour / 3600 · 10⁶ / total_tok_per_s; None without a price
    spread: dict[str, tuple[float, float]]  # of each rate: its smallest and its largest pass


def check(run: Run) -> None:
    """Raise `ConfigError` when the answer to a run's question, or what is published beside it, is no figure."""
    known = [field.name for field in fields(Metrics)]
    named = [("question.figures", name) for name in run.question.figures] if run.question else []
    named += [("published.figure", run.published.figure)] if run.published else []
    for key, name in named:
        if name not in known:
            instead = errors.closest(name, known) or f"one of {', '.join(known)}"
            raise ConfigError(f"{key}: {name} is not a figure: pass {instead}")


def derive(
    samples: Samples,
    plan: Plan,
    prediction: Prediction,
    *,
    perplexity: float | None,
    kl_divergence: float | None = None,
    gpu_peak_bytes: int,
    host_peak_bytes: int,
    disk_peak_bytes: int,
) -> Metrics:
    """Return the metrics of a run, compared with its plan's bound and with the prediction made before it began.

    Both are given the bytes that were copied, where these depend on the experts that tokens were routed to.
    """
    if (routed_plan := as_routed(plan, samples)) is not plan:
        plan, prediction = routed_plan, predict(routed_plan)
    work, passes, routed = plan.run.workload, samples.measured, _routed(samples)
    batch, bound, machine_s = work.sequences, lower_bound(plan), machine_bound_s(plan)
    prefill = [batch * work.prompt_len / one.ttft_s for one in passes]
    total = [batch * work.gen_len / one.total_s for one in passes]
    decode = [batch * len(one.step_s) / sum(one.step_s) for one in passes if one.step_s]
    steps = [step for one in passes for step in one.step_s]
    step = median(steps) if steps else None
    ttft = median(one.ttft_s for one in passes)
    rates = {"prefill_tok_per_s": prefill, "decode_tok_per_s": decode, "total_tok_per_s": total}
    return Metrics(
        prefill_tok_per_s=median(prefill),
        decode_tok_per_s=median(decode) if decode else None,
        total_tok_per_s=median(total),
        ttft_s=ttft,
        tpot_p50_s=step,
        tpot_p90_s=_percentile(steps, 90),
        tpot_p99_s=_percentile(steps, 99),
        tok_per_s_per_user=1 / step if step else None,
        load_s=samples.load_s,
        gpu_peak_bytes=gpu_peak_bytes,
        host_peak_bytes=host_peak_bytes,
        disk_peak_bytes=disk_peak_bytes,
        link_bytes_per_s=plan.link_bytes_per_pass / step if step else None,
        disk_bytes_per_s=plan.disk_bytes_per_step / step if step else None,
        experts_per_layer=routed.experts / routed.layers if routed else None,
        experts_per_layer_on_host=routed.on_host / routed.layers if routed and plan.storage.host_experts else None,
        expert_hit_rate=_hit_rate(plan, routed) if routed else None,
        expert_host_hit_rate=_host_hit_rate(plan, routed) if routed else None,
        fraction_of_bound=bound.decode_step_s / step if step and bound.decode_step_s else None,
        prefill_fraction_of_bound=bound.prefill_s / ttft if bound.prefill_s else None,
        fraction_of_machine_bound=machine_s / step if step and machine_s else None,
        prefill_prediction_error=prediction.prefill_s / ttft - 1 if prediction.prefill_s else None,
        decode_prediction_error=prediction.decode_step_s / step - 1 if step and prediction.decode_step_s else None,
        perplexity=perplexity,
        kl_divergence=kl_divergence,
        gpu_joules_per_token=_joules_per_token("gpu", passes, batch * work.gen_len),
        cpu_joules_per_token=_joules_per_token("cpu", passes, batch * work.gen_len),
        dram_joules_per_token=_joules_per_token("dram", passes, batch * work.gen_len),
        cost_per_million_tokens=cost_per_million_tokens(plan, median(total)),
        spread={name: (min(values), max(values)) for name, values in rates.items() if values},
    )


def as_routed(plan: Plan, samples: Samples) -> Plan:
    """Return the plan with the bytes that decode steps have really copied and read, where the routing decides on them."""
    return with_counts(plan, _routed(samples), sum(len(one.step_s) for one in samples.measured))


def with_counts(plan: Plan, routed: Routed | None, steps: int) -> Plan:
    """Return the plan with what `steps` decode steps have copied and read, if they bring routed experts only."""
    if routed is None or not steps or not plan.draws_experts:
        return plan
    stored = plan.storage
    if stored.streamed_bytes_per_step is not None:
        stored = replace(stored, streamed_bytes_per_step=(routed.copied_bytes + routed.own_bytes) // steps)
    if stored.host_experts:
        stored = replace(stored, host_bytes_per_step=routed.on_host_bytes // steps)
    if stored.disk_bytes_per_step is not None:
        stored = replace(stored, disk_bytes_per_step=(routed.read_bytes + routed.own_bytes) // steps)
    return replace(plan, storage=stored)


def _hit_rate(plan: Plan, routed: Routed) -> float | None:
    """Return the share of experts that was on the device; None if none is ever copied alone."""
    return 1 - (routed.copied + routed.on_host) / routed.experts if plan.storage.cached_bytes else None


def _host_hit_rate(plan: Plan, routed: Routed) -> float | None:
    """Return the share of experts looked for in host memory that were there; None if none is on disk, or looked for."""
    wanted = routed.copied if plan.storage.cached_bytes else routed.experts
    return 1 - routed.read / wanted if plan.storage.host_cached_bytes and wanted else None


def _routed(samples: Samples) -> Routed | None:
    """Return the total over the decode steps of all measured passes; None if they bring all experts, or there are none."""
    found = [one.routed for one in samples.measured if one.routed and one.routed.layers]
    return reduce(Routed.plus, found) if found else None


def timeline(samples: Samples) -> list[float]:
    """Return the time of each decode step in s: its median over the measured passes."""
    return [median(times) for times in zip(*(one.step_s for one in samples.measured), strict=True)]


def passed(figures: Metrics) -> Passed | None:
    """Return the fractions of bounds that the run beats by more than noise: these bounds are wrong. Else None."""
    fractions = {"prefill": figures.prefill_fraction_of_bound, "decode": figures.fraction_of_bound}
    beyond = {name: value for name, value in fractions.items() if value is not None and value > NOISE}
    return beyond or None


def without_passed(figures: Metrics) -> Metrics:
    """Return `figures` without the fractions of bounds that the run has passed."""
    beyond = passed(figures) or {}
    return replace(
        figures,
        fraction_of_machine_bound=None if "decode" in beyond else figures.fraction_of_machine_bound,
        fraction_of_bound=None if "decode" in beyond else figures.fraction_of_bound,
        prefill_fraction_of_bound=None if "prefill" in beyond else figures.prefill_fraction_of_bound,
    )


def _joules_per_token(kind: str, passes: list[Pass], tokens: int) -> float | None:
    """Return the energy of all counters of a kind; None if there is none, or one of them is unknown."""
    found = [ends for one in passes for name, ends in one.joules.items() if name.startswith(f"{kind}:")]
    known = [after - before for before, after in filter(None, found)]
    if len(known) < len(found):
        return None
    return sum(known) / (tokens * len(passes)) or None


def _percentile(values: list[float], percent: int) -> float | None:
    if len(values) < 2:
        return values[0] if values else None
    return quantiles(values, n=100, method="inclusive")[percent - 1]
