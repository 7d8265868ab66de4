"""The picture of docs/stream.md: what the link, the expansion and the layers do while tokens are decoded, from a trace.

python benchmarks/timeline.py            records docs/results/timeline.json on a GPU, and draws docs/timeline.svg
python benchmarks/timeline.py --draw     only draws
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from picture import draw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout, whether it is installed or not
RESULT, PICTURE = ROOT / "docs" / "results" / "timeline.json", ROOT / "docs" / "timeline.svg"
LAYERS, TOKENS, STEPS = 8, 6, 3  # of the model; generated while profiling; drawn, the last ones
TOKEN, EXPAND = "token known", "_expand"  # the mark set below, and how the kernels' names begin
MERGE_US = 100  # kernels of one layer are closer than this, under a profiler too; layers are not


def record(quant: str) -> dict[str, Any]:
    """Spans of the last decode steps of one `generate`, in µs from the first token that is drawn."""
    import torch

    from zi_experiments import environment
    from zi_experiments.config.composition import from_choices
    from zi_experiments.engines import base
    from zi_experiments.execution.preparation import prepare
    from zi_experiments.runtime import progress

    choices = {"model": "opt-13b", "offload": "cpu", "quant": quant, "engine": "stream"}
    choices |= {"workload": "zero-inference", "tracking": "none"}
    settings = {"model.architecture.num_hidden_layers": LAYERS, "workload.gen_len": TOKENS, "engine.profile": None}
    plan = prepare(from_choices(choices, settings), ROOT)
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
    reduced = reduce(trace, config["slot_bytes"], config["slots"])
    if quant != "fp16" and not reduced["expand"]:
        print(f"no kernel of the trace is called {EXPAND}…: the row of expansions stays out", file=sys.stderr)
    return {"slab_bytes": config["slot_bytes"], **reduced}


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
    events = sorted((e for e in events if e.get("ph") == "X"), key=lambda e: e["ts"])
    tokens = [e["ts"] for e in events if e["name"] == TOKEN and not e.get("cat", "").startswith("gpu")]
    copies = [e for e in events if e.get("cat") == "gpu_memcpy" and "HtoD" in e["name"]]
    slabs = [e for e in copies if e.get("args", {}).get("bytes", 0) >= 0.5 * slab_bytes]
    if len(tokens) <= STEPS or not slabs:
        sizes = sorted({e.get("args", {}).get("bytes") for e in copies}, key=str)[-5:]
        raise SystemExit(
            f"the trace has {len(tokens)} tokens and {len(slabs)} copies of {slab_bytes} bytes, not {sizes}"
        )
    kernels = [e for e in events if e.get("cat") == "kernel"]
    start, end = tokens[-STEPS - 1], tokens[-1]

    def inside(spans: list[list[float]]) -> list[list[float]]:
        return [
            [round(at - start, 1), round(length, 1), *rest]
            for at, length, *rest in spans
            if at < end and at + length > start
        ]

    # at the end all slots hold the first layers of a pass to come, so that the last copy is of layer `slots` − 1
    numbers = [(slots - 1 - behind) % LAYERS for behind in reversed(range(len(slabs)))]
    return {
        "tokens_us": [round(at - start, 1) for at in tokens[-STEPS - 1 :]],
        "link": inside([[e["ts"], e["dur"], layer] for e, layer in zip(slabs, numbers, strict=True)]),
        "expand": inside(merged([e for e in kernels if e["name"].startswith(EXPAND)])),
        "compute": inside(merged([e for e in kernels if not e["name"].startswith(EXPAND)])),
    }


def merged(events: list[dict[str, Any]]) -> list[list[float]]:
    """Spans of events in the order of their starts, those with less than `MERGE_US` between them made one."""
    spans: list[list[float]] = []
    for event in events:
        if spans and event["ts"] - sum(spans[-1]) < MERGE_US:
            spans[-1][1] = max(spans[-1][1], event["ts"] + event["dur"] - spans[-1][0])
        else:
            spans.append([event["ts"], event["dur"]])
    return spans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw what has been recorded")
    parser.add_argument("--result", type=Path, default=RESULT, help="the JSON file")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="the SVG file")
    asked = parser.parse_args()
    if not asked.draw:
        quants = {quant: record(quant) for quant in ("fp16", "int4")}
        import torch

        made_by = {
            "command": "python benchmarks/timeline.py",
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
        }
        result = {**made_by, "model": f"{LAYERS} layers of OPT-13B", "quants": quants}
        asked.result.write_text(json.dumps(result) + "\n")
    asked.picture.write_text(draw(json.loads(asked.result.read_text())))


if __name__ == "__main__":
    main()
