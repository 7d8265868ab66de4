"""The tables of docs/experts.md, from the benchmark's results.

python benchmarks/experts.py [--output FILE]
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cases import CASES, Entries, Entry
from predictions import Compared, compare, runs, write

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "experts.md"
RESULT = DOCS / "results" / "bench-h100-80gb-hbm3.json"
GROUPS = ("experts-", "one-")
MARKS = ("<!-- benchmarks/experts.py writes what follows -->\n", "<!-- up to here -->\n")
COLUMNS = (
    *(
        "model",
        "weights on",
        "prompts",
        "GPU",
        "decode tok/s",
        "experts of a layer in a step",
        "of these on the GPU already",
    ),
    *("× whole layers", "prefill, of its bound", "step predicted by the run", "today", "targets"),
)


def tables(entries: Entries) -> str:
    """A row for each case of a mixture of experts, or of one sequence."""
    made = f"\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    order = [one.name for one in CASES if one.group.startswith(GROUPS)]
    for entry in (entries[name] for name in order if entries.get(name, {}).get("metrics")):
        (measured,) = runs({"cases": {"one": entry}})
        made += f"| {' | '.join(_cells(compare(measured), entry))} |\n"
    return made + "\n"


def _cells(one: Compared, entry: Entry) -> Iterator[str]:
    plan, run, metrics = one.plan, one.plan.run, entry["metrics"]
    yield run.model.name
    yield {"none": "the GPU", "cpu": "host", "nvme": "disk"}[run.offload.name]
    yield f"{run.workload.sequences} × {run.workload.prompt_len}"
    yield f"{run.hardware.memory_gib:g} GiB, `auto`" if run.hardware.memory_gib else ""
    yield f"{metrics['decode_tok_per_s']:.1f}"
    experts, hits = metrics.get("experts_per_layer"), metrics.get("expert_hit_rate")
    yield f"{experts:.1f}" if experts else "all" if plan.experts else ""
    yield f"{100 * hits:.0f} %" if hits is not None and plan.storage.cached_bytes else ""
    # the least time that the link takes for all experts
    whole_s = entry["plan"]["streamed_bytes_per_pass"] / entry["ceilings"]["link_bytes_per_s"]
    yield f"{whole_s / metrics['tpot_p50_s']:.2f}" if run.offload.name == "cpu" else ""
    yield f"{metrics['prefill_fraction_of_bound']:.2f}"
    yield f"{100 * metrics['decode_prediction_error']:+.1f} %"
    yield f"{100 * one.step_error:+.1f} %"
    yield "; ".join(filter(None, map(_missed, entry["targets"]))) or "met"


def _missed(target: dict[str, Any]) -> str | None:
    """A target that was missed, or not measured; those of predictions have columns of their own."""
    if target["met"] or target["what"].startswith("error of the predicted"):
        return None
    achieved = "unknown" if target["achieved"] is None else f"{target['achieved']:.2f}"
    return f"{achieved} {target['what']}, not {target.get('at_least', target.get('at_most')):g}"


def page(text: str, entries: Entries) -> str:
    """The page with its tables made anew."""
    begin, end = map(re.escape, MARKS)
    pattern = re.compile(f"(?<={begin}).*(?={end})", re.DOTALL)
    assert pattern.search(text)
    return pattern.sub(lambda _: tables(entries), text)


def load() -> Entries:
    return dict(json.loads(RESULT.read_text(encoding="utf-8"))["cases"])


if __name__ == "__main__":
    write(__doc__, PAGE, lambda: page(PAGE.read_text(encoding="utf-8"), load()))
