"""The columns of all tables, and where a record has their values."""

from dataclasses import dataclass, fields

from zi_experiments.results.metrics import Metrics

Scalar = str | int | float | bool | None
Path = tuple[str | int, ...]  # of keys into the JSON of a record, from the outside in


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    name: str
    label: str
    unit: str = ""  # s, B, B/s, tok/s, J; share: of 1; count; empty: text
    places: tuple[Path, ...] = ()  # the first that has a value counts; none: the column is derived
    is_shown: bool = False  # in the table of the page

    @property
    def is_text(self) -> bool:
        return not self.unit


def _text(name: str, label: str, *places: str, is_shown: bool = False) -> Column:
    return _number(name, label, "", *places, is_shown=is_shown)


def _number(name: str, label: str, unit: str, *places: str, is_shown: bool = False) -> Column:
    return Column(name=name, label=label, unit=unit, places=tuple(map(_path, places)), is_shown=is_shown)


def _path(text: str) -> Path:
    """Keys from a dotted text. After a colon is one key: settings have dotted names."""
    if text.startswith("settings:"):
        return ("settings", text.removeprefix("settings:"))
    return tuple(int(key) if key.isdigit() else key for key in text.split("."))


def _metric(name: str, label: str, unit: str, is_shown: bool = False) -> Column:
    return _number(name, label, unit, f"metrics.{name}", is_shown=is_shown)


def _extremes(name: str, label: str) -> tuple[Column, Column]:
    """The smallest and the largest pass of a rate."""
    return (
        _number(f"{name}_min", f"{label}, smallest pass", "tok/s", f"metrics.spread.{name}.0"),
        _number(f"{name}_max", f"{label}, largest pass", "tok/s", f"metrics.spread.{name}.1"),
    )


_NAMED: tuple[Column, ...] = (
    _text("name", "run", "run.name"),
    _text("status", "status", "status", is_shown=True),
    _text("model", "model", "settings:model.name", "settings:model", is_shown=True),
    _text("engine", "engine", "settings:engine", "settings:engine.name", is_shown=True),
    _text("offload", "offload", "settings:offload", "settings:offload.name", is_shown=True),
    _text("quant", "quant", "settings:quant", "settings:quant.name", is_shown=True),
    _text("kv_cache", "KV cache", "settings:kv_cache", "settings:kv_cache.name"),
    _text("weights", "weights", "settings:weights", "settings:weights.source"),
    _number("num_gpus", "GPUs", "count", "settings:hardware.num_gpus"),
    _number("batch_size", "batch size", "count", "plan.batch_size", "settings:workload.batch_size"),
    _number("sequences", "sequences", "count", "plan.sequences", is_shown=True),
    _number("prompt_len", "prompt", "count", "settings:workload.prompt_len", is_shown=True),
    _number("gen_len", "generated", "count", "settings:workload.gen_len", is_shown=True),
    _number("passes", "passes", "count", is_shown=True),
    _metric("prefill_tok_per_s", "prefill tok/s", "tok/s", is_shown=True),
    _metric("decode_tok_per_s", "decode tok/s", "tok/s", is_shown=True),
    _metric("total_tok_per_s", "prefill and decode tok/s", "tok/s"),
    _metric("tok_per_s_per_user", "decode tok/s per user", "tok/s", is_shown=True),
    *_extremes("prefill_tok_per_s", "prefill tok/s"),
    *_extremes("decode_tok_per_s", "decode tok/s"),
    *_extremes("total_tok_per_s", "prefill and decode tok/s"),
    _metric("ttft_s", "time to first token", "s", is_shown=True),
    _metric("tpot_p50_s", "time per token, p50", "s", is_shown=True),
    _metric("tpot_p90_s", "time per token, p90", "s"),
    _metric("tpot_p99_s", "time per token, p99", "s"),
    _metric("fraction_of_bound", "decode, of bound", "share", is_shown=True),
    _metric("prefill_fraction_of_bound", "prefill, of bound", "share", is_shown=True),
    _metric("fraction_of_machine_bound", "decode, of the machine", "share"),
    _metric("decode_prediction_error", "decode prediction error", "share", is_shown=True),
    _metric("prefill_prediction_error", "prefill prediction error", "share"),
    _metric("link_bytes_per_s", "host to device", "B/s", is_shown=True),
    _metric("disk_bytes_per_s", "from disk", "B/s"),
    _metric("perplexity", "perplexity", "count", is_shown=True),
    _metric("kl_divergence", "KL divergence, nats", "count", is_shown=True),
    _metric("gpu_joules_per_token", "GPU energy per token", "J", is_shown=True),
    _metric("cpu_joules_per_token", "CPU energy per token", "J", is_shown=True),
    _metric("dram_joules_per_token", "memory energy per token", "J", is_shown=True),
    _metric("cost_per_million_tokens", "cost per million tokens", "count", is_shown=True),
    _metric("load_s", "loaded in", "s", is_shown=True),
    _metric("gpu_peak_bytes", "GPU peak", "B", is_shown=True),
    _metric("host_peak_bytes", "host peak", "B", is_shown=True),
    _metric("disk_peak_bytes", "disk peak", "B", is_shown=True),
    _text("verified", "verified", "verification.passed", is_shown=True),
    _number("max_rel_error", "largest relative error", "count", "verification.max_rel_error"),
    _number("verify_s", "verified in", "s", "verification.verify_s"),
    _text("error_type", "error", "error.type"),
    _text("error", "reason", "error.message"),
    _text("hint", "hint", "error.hint"),
    _text("dtype", "dtype", "plan.dtype"),
    _number("num_parameters", "parameters", "count", "plan.num_parameters"),
    _number("bits_per_weight", "bits per weight", "count", "plan.bits_per_weight"),
    _number("weight_bytes", "weights", "B", "plan.weight_bytes"),
    _number("kv_cache_bytes", "KV cache", "B", "plan.kv_cache_bytes"),
    _number("streamed_bytes_per_pass", "weights that cross in a pass", "B", "plan.streamed_bytes_per_pass"),
    _number("planned_gpu_bytes", "weights on the GPU, plan", "B", "plan.placement.gpu_bytes"),
    _number("planned_cpu_bytes", "weights in host memory, plan", "B", "plan.placement.cpu_bytes"),
    _number("planned_nvme_bytes", "weights on disk, plan", "B", "plan.placement.nvme_bytes"),
    _number("planned_gpu_total_bytes", "GPU in all, plan", "B"),
    _number("planned_host_total_bytes", "host in all, plan", "B"),
    _number("planned_disk_total_bytes", "disk in all, plan", "B"),
    _number("stored_gpu_bytes", "weights on the GPU, found", "B", "stored.gpu_bytes"),
    _number("stored_cpu_bytes", "weights in host memory, found", "B", "stored.cpu_bytes"),
    _number("stored_nvme_bytes", "weights on disk, found", "B", "stored.nvme_bytes"),
    _number("bound_prefill_s", "prefill, bound", "s", "plan.bound.prefill_s"),
    _text("bound_prefill_limited_by", "prefill, limited by", "plan.bound.prefill_limited_by"),
    _number("bound_decode_step_s", "decode step, bound", "s", "plan.bound.decode_step_s"),
    _text("bound_limited_by", "decode, limited by", "plan.bound.limited_by"),
    _number("predicted_load_s", "load, predicted", "s", "plan.prediction.load_s"),
    _number("predicted_prefill_s", "prefill, predicted", "s", "plan.prediction.prefill_s"),
    _text("predicted_prefill_limited_by", "prefill, mostly spent on", "plan.prediction.prefill_limited_by"),
    _number("predicted_decode_step_s", "decode step, predicted", "s", "plan.prediction.decode_step_s"),
    _text("predicted_limited_by", "decode, mostly spent on", "plan.prediction.limited_by"),
    _number(
        "predicted_cost_per_million_tokens",
        "cost per million tokens, predicted",
        "count",
        "plan.prediction.cost_per_million_tokens",
    ),
    _text("rates_source", "source of the rates", "plan.bound.source"),
    _text("machine", "machine", is_shown=True),
    _text("started_at", "started", "run.started_at", is_shown=True),
    _text("finished_at", "finished", "run.finished_at"),
    _text("command", "command", "run.command"),
    _text("git_revision", "revision", "run.git_revision"),
    _text("fingerprint", "fingerprint", "run.fingerprint"),
    _text("id", "id", "run.id"),
    _text("source", "file"),
)
_UNITS = {"tok_per_s": "tok/s", "bytes_per_s": "B/s", "bytes": "B", "s": "s"}  # by how the name of a figure ends


def _others() -> tuple[Column, ...]:
    """Return a column for each figure of `Metrics` that has none above."""
    named = {column.name for column in _NAMED} | {"spread"}
    names = [field.name for field in fields(Metrics) if field.name not in named]
    units = [next((unit for end, unit in _UNITS.items() if name.endswith(f"_{end}")), "count") for name in names]
    return tuple(_metric(name, name.replace("_", " "), unit) for name, unit in zip(names, units, strict=True))


COLUMNS = (*_NAMED, *_others())
