"""The runs in the forms of llama-bench and optimum-benchmark: docs/report.md has what each field means here."""

from collections.abc import Iterator
from math import ceil, floor, sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

import orjson

from zi_experiments.report.runs import Run

_CACHE_TYPES = {"float16": "f16", "bfloat16": "bf16"}
_GIB = 1 << 30
_COLUMNS = ("model", "size", "params", "backend", "engine", "offload", "quant", "sequences", "test", "t/s")
_TEXTS = ("model", "backend", "engine", "offload", "quant", "test")


def write(runs: list[Run], names: list[str], folder: Path) -> list[Path]:
    """Write llama-bench.md, llama-bench.jsonl and optimum-benchmark.json into the folder. Return their paths.

    They have the runs with the times of each pass.
    """
    table, tests, reports = (
        folder / name for name in ("llama-bench.md", "llama-bench.jsonl", "optimum-benchmark.json")
    )
    timed = [(run, name) for run, name in zip(runs, names, strict=True) if run.passes.ttft_s]
    found = [test for run, _ in timed for test in llama_bench(run)]
    table.write_text(_markdown(found), encoding="utf-8")
    tests.write_bytes(b"".join(orjson.dumps(test, option=orjson.OPT_APPEND_NEWLINE) for test in found))
    reports.write_bytes(orjson.dumps({name: {"report": optimum_benchmark(run)} for run, name in timed}))
    return [table, tests, reports]


def llama_bench(run: Run) -> Iterator[dict[str, Any]]:
    """Yield the tests of a run: the prompt (pp), and what is generated after it (tg)."""
    prompt_len, gen_len, sequences = (run.row[name] for name in ("prompt_len", "gen_len", "sequences"))
    if not isinstance(prompt_len, int) or not isinstance(gen_len, int) or not isinstance(sequences, int):
        return
    yield _test(run, run.passes.ttft_s, sequences * prompt_len, n_prompt=prompt_len, n_gen=0, n_depth=0)
    if decode_s := _decode_s(run):
        yield _test(run, decode_s, sequences * (gen_len - 1), n_prompt=0, n_gen=gen_len - 1, n_depth=prompt_len)


def _test(run: Run, times_s: list[float], tokens: int, **shape: int) -> dict[str, Any]:
    row, environment = run.row, run.environment
    rates = [tokens / time_s for time_s in times_s]
    nanoseconds = [round(1e9 * time_s) for time_s in times_s]
    return {
        "build_commit": row["git_revision"],
        "cpu_info": environment.get("cpu"),
        "gpu_info": environment.get("gpu"),
        "backends": str(environment.get("device") or "").upper() or None,
        "model_type": f"{row['model']} {row['quant']}",
        "model_size": row["weight_bytes"],
        "model_n_params": row["num_parameters"],
        "type_k": _CACHE_TYPES.get(str(row["dtype"])),
        "type_v": _CACHE_TYPES.get(str(row["dtype"])),
        **shape,
        "test_time": row["started_at"],
        "avg_ns": round(fmean(nanoseconds)),
        "stddev_ns": None if (deviation := _sample_deviation(nanoseconds)) is None else round(deviation),
        "avg_ts": fmean(rates),
        "stddev_ts": _sample_deviation(rates),
        "samples_ns": nanoseconds,
        "samples_ts": rates,
        "run_id": row["id"],
        "engine": row["engine"],
        "offload": row["offload"],
        "quant": row["quant"],
        "sequences": row["sequences"],
    }


def _markdown(tests: list[dict[str, Any]]) -> str:
    """Return the tests as llama-bench prints them, with the columns in which runs of this project differ."""
    ruled = ("---" if name in _TEXTS else "---:" for name in _COLUMNS)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (_COLUMNS, ruled, *map(_cells, tests)))


def _cells(test: dict[str, Any]) -> tuple[str, ...]:
    kind = f"pp{test['n_prompt']}" if test["n_prompt"] else f"tg{test['n_gen']} @ d{test['n_depth']}"
    spread = "" if test["stddev_ts"] is None else f" ± {test['stddev_ts']:.2f}"
    size, params = test["model_size"], test["model_n_params"]
    return (
        test["model_type"],
        "" if size is None else f"{size / _GIB:.2f} GiB",
        "" if params is None else f"{params / 1e9:.2f} B",
        *(str(test[name] or "") for name in ("backends", "engine", "offload", "quant", "sequences")),
        kind,
        f"{test['avg_ts']:.2f}{spread}",
    )


def optimum_benchmark(run: Run) -> dict[str, Any]:
    """Return the targets of a report that mean the same here."""
    sequences, gen_len, load_s = (run.row[name] for name in ("sequences", "gen_len", "load_s"))
    passes = run.passes
    report: dict[str, Any] = {"generate": {"latency": _latency(passes.total_s)}}
    report["prefill"] = {"latency": _latency(passes.ttft_s)} | _throughput(sequences, passes.ttft_s, "samples/s")
    if isinstance(load_s, float):
        report["load_model"] = {"latency": _latency([load_s])}
    if decode_s := _decode_s(run):
        tokens = sequences * (gen_len - 1) if isinstance(sequences, int) and isinstance(gen_len, int) else None
        report["decode"] = {"latency": _latency(decode_s)} | _throughput(tokens, decode_s, "tokens/s")
        report["per_token"] = {"latency": _latency([step_s for steps in passes.step_s for step_s in steps])}
    return report


def _throughput(volume: Any, times_s: list[float], unit: str) -> dict[str, Any]:
    if not isinstance(volume, int):
        return {}
    return {"throughput": {"unit": unit, "value": volume / fmean(times_s)}}


def _latency(values: list[float]) -> dict[str, Any]:
    """Return statistics of times in seconds. The deviation is that of all values; `stdev_` is in percent of the mean."""
    mean, ordered = fmean(values), sorted(values)
    deviation = sqrt(fmean([(value - mean) ** 2 for value in values]))
    return {
        "unit": "s",
        "values": values,
        "count": len(values),
        "total": sum(values),
        "mean": mean,
        **{f"p{percent}": _percentile(ordered, percent) for percent in (50, 90, 95, 99)},
        "stdev": deviation,
        "stdev_": 100 * deviation / mean if mean else 0.0,
    }


def _percentile(ordered: list[float], percent: int) -> float:
    """Return a percentile of sorted values, with what lies between two of them on a straight line."""
    place = (len(ordered) - 1) * percent / 100
    low, high = ordered[floor(place)], ordered[ceil(place)]
    return low + (high - low) * (place - floor(place))


def _decode_s(run: Run) -> list[float]:
    """Return the seconds of each pass from its first token to its last; empty with one token."""
    return [sum(steps) for steps in run.passes.step_s if steps]


def _sample_deviation(values: list[Any]) -> float | None:
    """Return the deviation of a sample; None for one value."""
    mean = fmean(values)
    return sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else None
