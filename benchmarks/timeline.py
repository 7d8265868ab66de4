"""The pictures of docs/stream.md and docs/experts.md: what link and GPU do while tokens are decoded, from a trace.

python benchmarks/timeline.py              records docs/results/timeline.json on a GPU, and draws docs/timeline.svg
python benchmarks/timeline.py --experts    the same of routed experts: timeline-experts.json and timeline-experts.svg
python benchmarks/timeline.py --draw       only draws
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from picture import draw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout, whether it is installed or not
LAYERS, TOKENS, STEPS = 8, 6, 3  # of the model; generated while profiling; drawn, the last ones
# of a mixture of experts: so many that the pool of a step's experts keeps none of another layer; drawn, the first ones
ROUTED_LAYERS, DRAWN = 12, 4
CHOICE_BYTES = 16  # of the numbers of two experts
TOKEN, EXPAND = "token known", "_expand"  # the mark set below, and how the kernels' names begin
PRODUCTS = "_by_"  # the same of products with packed experts
MERGE_US = 100  # kernels of one layer are closer than this, under a profiler too; layers are not


def record(quant: str) -> dict[str, Any]:
    """Spans of the last decode steps of one `generate`, in µs from the first token that is drawn."""
    trace, config = trace_of({"model": "opt-13b", "quant": quant}, {"model.architecture.num_hidden_layers": LAYERS})
    reduced = reduce(trace, config["slot_bytes"], config["slots"])
    if quant != "fp16" and not reduced["expand"]:
        print(f"no kernel of the trace is called {EXPAND}…: the row of expansions stays out", file=sys.stderr)
    return {"slab_bytes": config["slot_bytes"], **reduced}


def record_routed() -> dict[str, Any]:
    """The same of the first layers in the last step, with one sequence."""
    settings = {"model.architecture.num_hidden_layers": ROUTED_LAYERS, "workload.batch_size": 1}
    trace, _ = trace_of({"model": "mixtral-8x7b", "quant": "int4"}, settings | {"workload.prompt_len": 128})
    return reduce_routed(trace)


def trace_of(choices: dict[str, str], settings: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of a run's last `generate`, and its engine's configuration."""
    import torch

    from zi_experiments import environment
    from zi_experiments.config.composition import from_choices
    from zi_experiments.engines import base
    from zi_experiments.execution.preparation import prepare
    from zi_experiments.runtime import progress

    choices = choices | {"offload": "cpu", "engine": "stream", "workload": "zero-inference", "tracking": "none"}
    settings = settings | {"workload.gen_len": TOKENS, "engine.profile": None}
    plan = prepare(from_choices(choices, settings), [ROOT])
    if plan.machine.device != "cuda":
        raise SystemExit("no GPU is visible: --draw works without one")
    environment.set_variables(environment.worker_environment(cuda=True))
    engine, told, work = base.get("stream"), progress.silent(), plan.run.workload
    config = engine.config(plan, [])
    engine.prepare(plan, told)
    with torch.no_grad():
        session = engine.load(plan, config, told)
    ids = torch.randint(5, plan.architecture.config.vocab_size, (work.sequences, work.prompt_len))
    session.generate(ids, TOKENS, None)
    torch.cuda.synchronize()
    trace = profile(lambda marks: session.generate(ids, TOKENS, marks))
    session.close()
    return trace, config


def profile(generate: Any) -> list[dict[str, Any]]:
    """The events of a chrome trace of `generate(streamer)`."""
    import torch
    from torch.profiler import ProfilerActivity

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        generate(Marks())
        if on_gpu:
            torch.cuda.synchronize()  # the copies for a next pass are part of the trace
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


class Marks:
    """A streamer that marks in the trace when each token is known on the host."""

    def __init__(self) -> None:
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        import torch

        if self._prompt_seen:
            with torch.profiler.record_function(TOKEN):
                pass
        self._prompt_seen = True

    def end(self) -> None:
        pass


def reduce(events: list[dict[str, Any]], slab_bytes: int, slots: int) -> dict[str, Any]:
    """The lanes of the last steps; a span is [start, duration], on the link with its layer too."""
    tokens, copies, kernels = kinds(events)
    slabs = [e for e in copies if e.get("args", {}).get("bytes", 0) >= 0.5 * slab_bytes]
    if len(tokens) <= STEPS or not slabs:
        sizes = sorted({e.get("args", {}).get("bytes") for e in copies}, key=str)[-5:]
        raise SystemExit(
            f"the trace has {len(tokens)} tokens and {len(slabs)} copies of {slab_bytes} bytes, not {sizes}"
        )
    start, end = tokens[-STEPS - 1], tokens[-1]
    inside = partial(between, start, end)
    # at the end all slots hold the first layers of a pass to come, so that the last copy is of layer `slots` − 1
    numbers = [(slots - 1 - behind) % LAYERS for behind in reversed(range(len(slabs)))]
    return {
        "tokens_us": [round(at - start, 1) for at in tokens[-STEPS - 1 :]],
        "link": inside([[e["ts"], e["dur"], layer] for e, layer in zip(slabs, numbers, strict=True)]),
        "expand": inside(merged([e for e in kernels if e["name"].startswith(EXPAND)])),
        "compute": inside(merged([e for e in kernels if not e["name"].startswith(EXPAND)])),
    }


def reduce_routed(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The lanes of the first layers of the last step, from its first token on."""
    tokens, copies, kernels = kinds(events)
    experts = [e for e in copies if e.get("args", {}).get("bytes", 0) >= 1 << 20]
    # each layer's choice is read back before its experts are copied; a token, and whether it is the last, are smaller
    back = [e for e in events if e.get("cat") == "gpu_memcpy" and "DtoH" in e["name"]]
    back = [e for e in back if e["args"]["bytes"] >= CHOICE_BYTES and tokens[-2] < e["ts"] < tokens[-1]]
    back.sort(key=lambda e: e["ts"])
    if len(tokens) < 2 or len(back) < ROUTED_LAYERS or not experts:
        raise SystemExit(
            f"the trace has {len(tokens)} tokens, {len(back)} read-backs, {len(experts)} copies of experts"
        )
    first, after = tokens[-2], back[DRAWN]["ts"]
    inside = partial(between, first, after)
    numbered = [[e["ts"], e["dur"], sum(b["ts"] < e["ts"] for b in back) - 1] for e in experts]
    products = [e for e in kernels if e["name"].startswith(PRODUCTS)]
    return {
        "expert_bytes": experts[-1]["args"]["bytes"],
        "tokens_us": [0.0],
        "end_us": round(after - first, 1),
        "link": inside(numbered),
        "read back": inside([[e["ts"], e["dur"]] for e in back]),
        "experts": inside(merged(products, 10)),
        "compute": inside(merged([e for e in kernels if not e["name"].startswith(PRODUCTS)], 10)),
    }


def kinds(events: list[dict[str, Any]]) -> tuple[list[float], list[dict[str, Any]], list[dict[str, Any]]]:
    """When tokens are known, copies from the host, and kernels, each in the order of time."""
    events = sorted((e for e in events if e.get("ph") == "X"), key=lambda e: e["ts"])
    tokens = [e["ts"] for e in events if e["name"] == TOKEN and not e.get("cat", "").startswith("gpu")]
    copies = [e for e in events if e.get("cat") == "gpu_memcpy" and "HtoD" in e["name"]]
    return tokens, copies, [e for e in events if e.get("cat") == "kernel"]


def between(start: float, end: float, spans: list[list[float]]) -> list[list[float]]:
    """The spans that are at least partly between two times, from the first one on."""
    return [
        [round(at - start, 1), round(length, 1), *rest]
        for at, length, *rest in spans
        if at < end and at + length > start
    ]


def merged(events: list[dict[str, Any]], gap_us: float = MERGE_US) -> list[list[float]]:
    """Spans of events in the order of their starts, those with less than `gap_us` between them made one."""
    spans: list[list[float]] = []
    for event in events:
        if spans and event["ts"] - sum(spans[-1]) < gap_us:
            spans[-1][1] = max(spans[-1][1], event["ts"] + event["dur"] - spans[-1][0])
        else:
            spans.append([event["ts"], event["dur"]])
    return spans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", action="store_true", help="routed experts, in place of whole layers")
    parser.add_argument("--draw", action="store_true", help="draw what has been recorded")
    parser.add_argument("--result", type=Path, help="the JSON file")
    parser.add_argument("--picture", type=Path, help="the SVG file")
    asked = parser.parse_args()
    name, model = "timeline", f"{LAYERS} layers of OPT-13B"
    if asked.experts:
        name, model = "timeline-experts", f"{ROUTED_LAYERS} layers of Mixtral-8x7B"
    result = asked.result or ROOT / "docs" / "results" / f"{name}.json"
    if not asked.draw:
        quants = {"int4": record_routed()} if asked.experts else {quant: record(quant) for quant in ("fp16", "int4")}
        import torch

        made_by = {
            "command": "python benchmarks/timeline.py" + (" --experts" if asked.experts else ""),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
        }
        result.write_text(json.dumps({**made_by, "model": model, "quants": quants}) + "\n")
    (asked.picture or ROOT / "docs" / f"{name}.svg").write_text(draw(json.loads(result.read_text())))


if __name__ == "__main__":
    main()
