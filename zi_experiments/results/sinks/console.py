"""Console output: the plan before a run, and a table after it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zi_experiments import lines
from zi_experiments.cost_model.bound import lower_bound
from zi_experiments.cost_model.plan import Plan
from zi_experiments.cost_model.prediction import Prediction
from zi_experiments.measurement.generated import Generated
from zi_experiments.results import explanation
from zi_experiments.results.explanation import LIMITS
from zi_experiments.results.metrics import Metrics, as_routed
from zi_experiments.results.record import Record
from zi_experiments.runtime.progress import Event
from zi_experiments.units import gigabytes, joules, scaled, seconds


class ConsoleSink:
    def __init__(self, console: Console) -> None:
        self._console = console

    def open(self, record: Record) -> None:
        assert record.plan is not None
        assert record.prediction is not None
        show_plan(record.run.name, record.plan, record.prediction, self._console)

    def progress(self, event: Event) -> None:
        pass  # the launcher shows it

    def write(self, record: Record) -> None:
        if record.status == "ok":
            self._table(record)
        elif record.error is not None:
            text = f" {record.run.name}: {record.error.message}"
            lines.say(text, self._console, head=record.status, style="bold red")
            if record.error.traceback and record.status == "error":
                trace = record.error.traceback.rstrip()
                self._console.print(trace, style="dim", markup=False, highlight=False, soft_wrap=True)
            if record.error.hint:
                lines.say(record.error.hint, self._console)

    def close(self) -> None:
        pass

    def _table(self, record: Record) -> None:
        metrics, plan, prediction = record.metrics, record.plan, record.prediction
        assert metrics is not None
        assert plan is not None
        assert prediction is not None
        work = plan.run.workload
        blocks = f"{work.micro_batches} × " if work.micro_batches > 1 else ""
        shape = f"{blocks}{work.batch_size} × ({work.prompt_len} + {work.gen_len}) tokens"
        table = Table(title=f"{escape(record.run.name)}: {shape}, {plan.dtype} on {plan.machine.gpu_name or 'CPU'}")
        table.add_column("")
        table.add_column("value", justify="right")
        table.add_column("range of passes", justify="right")
        for row in (*_speed(metrics, prediction), *_price(metrics), *_peaks(metrics)):
            table.add_row(*row)
        checked = record.verification
        table.add_row("verified in", seconds(checked.verify_s) if checked else "not verified")
        self._console.print(table)
        if record.generated is not None:
            self._generated(record.generated)
        if record.bound_passed:
            lines.say(explanation.passed(record.bound_passed, plan, metrics), self._console)
        assert record.samples is not None
        if why := explanation.sentence(as_routed(plan, record.samples), prediction, metrics):
            lines.say(why, self._console)

    def _generated(self, generated: Generated) -> None:
        if generated.first_text is not None:
            lines.say(f"the first sequence goes on: {generated.first_text}", self._console)
        if not generated.passes_equal:
            warning, why = "warning: passes gave different tokens", ": kernels that add in no fixed order can do that"
            lines.say(why, self._console, head=warning, style="yellow")


def _speed(metrics: Metrics, prediction: Prediction) -> Iterator[tuple[str, ...]]:
    for label, name in (("prefill", "prefill_tok_per_s"), ("decode", "decode_tok_per_s")):
        value = getattr(metrics, name)
        if value is not None:
            low, high = metrics.spread[name]
            yield label, f"{value:,.2f} tok/s", f"{low:,.2f} to {high:,.2f}" if low < high else ""
    yield "time to first token", seconds(metrics.ttft_s)
    if (error := metrics.prefill_prediction_error) is not None:
        yield "  predicted", explanation.predicted(prediction.prefill_s, error)
    if metrics.tpot_p50_s is not None and metrics.tpot_p99_s is not None:
        yield "time per token, p50/p99", f"{seconds(metrics.tpot_p50_s)} / {seconds(metrics.tpot_p99_s)}"
    if metrics.tpot_p50_s is not None and (error := metrics.decode_prediction_error) is not None:
        # given the experts that tokens were routed to, it is another one than before the run
        yield "  predicted", explanation.predicted((1 + error) * metrics.tpot_p50_s, error)
    if metrics.link_bytes_per_s:
        yield "host to device", scaled(metrics.link_bytes_per_s, "B/s")
    if metrics.disk_bytes_per_s:
        yield "from disk", scaled(metrics.disk_bytes_per_s, "B/s")
    if metrics.perplexity is not None:
        yield "perplexity", f"{metrics.perplexity:.4f}"
    if metrics.kl_divergence is not None:
        yield "KL divergence", f"{metrics.kl_divergence:.3g} nats/token"


def _price(metrics: Metrics) -> Iterator[tuple[str, ...]]:
    spent = {"GPU": metrics.gpu_joules_per_token, "CPU": metrics.cpu_joules_per_token}
    for label, value in (spent | {"memory": metrics.dram_joules_per_token}).items():
        if value is not None:
            yield f"{label} energy per token", joules(value)
    if metrics.cost_per_million_tokens is not None:
        yield "cost per million tokens", f"{metrics.cost_per_million_tokens:,.2f}"


def _peaks(metrics: Metrics) -> Iterator[tuple[str, ...]]:
    for label in ("GPU", "host", "disk"):
        if peak := getattr(metrics, f"{label.lower()}_peak_bytes"):
            yield f"{label} peak", gigabytes(peak)
    yield "loaded in", seconds(metrics.load_s)


def show_plan(name: str, plan: Plan, prediction: Prediction, console: Console) -> None:
    """Print in a few lines what a run is about to do."""
    arch, place = plan.architecture, plan.placement
    host = "pinned host" if plan.pin_memory else "host"
    where = [("GPU", place.gpu_bytes), (host, place.cpu_bytes), ("disk", place.nvme_bytes)]
    split = ", ".join(f"{gigabytes(amount)} {label}" for label, amount in where if amount)
    layers = " and ".join(one.rpartition(".")[2] for one in arch.layer_classes)
    lines.say(
        f": {_count(arch.num_parameters)} parameters, {arch.num_layers} layers of {layers}, {plan.dtype} on "
        f"{plan.machine.gpu_name or plan.machine.device}",
        console,
        head=name,
    )
    cache = gigabytes(plan.kv_cache_bytes)
    lines.say(f"weights {gigabytes(plan.weight_bytes)} ({split}){_copies(plan)}, KV cache {cache}", console)
    if plan.run.quant.is_quantized:
        text = _quantized(plan)
        few = f"warning: only {text}" if plan.quantized_fraction < 0.9 and not plan.run.quant.is_native else ""
        lines.say("" if few else text, console, head=few, style="yellow")
    bound = lower_bound(plan)
    if bound.decode_step_s and bound.limited_by:
        least = explanation.least(plan, bound.decode_step_s, bound.limited_by)
        step_s = prediction.decode_step_s
        predicted = f"; predicted {seconds(step_s)}" if step_s else ""
        drawn = ", if the experts of each token are drawn evenly" if plan.draws_experts else ""
        limit = f"limited by {LIMITS[bound.limited_by]}"
        machine_s = explanation.over_all_placements(plan)
        over_all = f", over all placements {seconds(machine_s)}" if machine_s else ""
        lines.say(f"a decode step takes at least {least}, {limit}{drawn}{over_all}{predicted}", console)
    elif why := explanation.unknown(plan):
        lines.say(why, console)
    for note in plan.notes:
        lines.say("", console, head=f"note: {note}", style="yellow")


def _copies(plan: Plan) -> str:
    """Return which of the weights are there more than once, as text; empty if none."""
    ranks = plan.run.hardware.num_gpus
    if not plan.storage.copied_bytes:
        return ""
    where = "on each GPU" if plan.machine.device == "cuda" else f"in each of {ranks} processes"
    return f", {gigabytes(plan.storage.copied_bytes / (ranks - 1))} of them {where}"


def _quantized(plan: Plan) -> str:
    """Return how much of the model is quantized, its bits per parameter, and what is kept in 16 bits, as text."""
    bits = plan.run.quant.bits
    how = f"quantized to {bits} bits" if bits is not None else f"in {' and '.join(each.name for each in plan.formats)}"
    share = f"{100 * plan.quantized_fraction:.0f} % of the parameters {how}"
    if kept := plan.quantized_fraction - plan.packed_fraction:
        share += (
            f"; engine={plan.run.engine.name} keeps {100 * kept:.0f} % (embeddings and head) dequantized in 16 bits"
        )
    return f"{share}; {plan.bits_per_weight:.2f} bits per parameter as stored"


def show_sweep(jobs: list[tuple[list[str], dict[str, Any]]]) -> None:
    """Print the records of a sweep in one table, in the order of its runs, each with the overrides that differ."""
    shared = set.intersection(*(set(overrides) for overrides, _ in jobs))
    figures = {
        label: [_figure(record, name, form) for _, record in jobs]
        for label, name, form in (
            ("prefill tok/s", "prefill_tok_per_s", "{:,.2f}"),
            ("decode tok/s", "decode_tok_per_s", "{:,.2f}"),
            ("of bound", "fraction_of_bound", "{:.0%}"),
            ("perplexity", "perplexity", "{:.4f}"),
            ("KL divergence", "kl_divergence", "{:.3g}"),
        )
    }
    known = {label: cells for label, cells in figures.items() if any(cells)}
    table = Table(title=f"{len(jobs)} runs")
    for label in ("run", "status", *known):
        table.add_column(label, justify="right" if label in known else "left", overflow="fold")
    for (overrides, record), *cells in zip(jobs, *known.values(), strict=True):
        status = record["status"] if record["status"] in ("ok", "kept", "skipped") else f"[bold red]{record['status']}"
        differs = " ".join(o for o in overrides if o not in shared) or str(record["run"]["name"])
        table.add_row(escape(differs), status, *cells)
    Console().print(table)


def _figure(record: dict[str, Any], name: str, form: str) -> str:
    value = (record["metrics"] or {}).get(name)
    return "" if value is None else form.format(value)


def display_path(path: Path) -> str:
    """Return a path as one would type it in the current folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _count(amount: int) -> str:
    return f"{amount / 1e9:.2f} B" if amount >= 1e9 else f"{amount / 1e6:.1f} M"
