"""The charts of the page and of W&B's saved view: what each shows, and its definition as it is printed beside it."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["answer", "fastest", "points", "frontier", "timelines", "bars", "failures"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    name: str
    run: int | None = None  # its number in the report; None: the value was published
    value: float | None = None  # a published one


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    id: str
    title: str
    kind: Kind  # how `charts.js` draws it
    definition: str
    drawn: str = ""  # what else one has to know of the page
    y: tuple[str, ...] = ()  # columns
    x: str | None = None
    by: tuple[str, ...] = ()  # columns: runs with equal values are one bar, that of the fastest
    bars: tuple[Bar, ...] = ()  # of an answer


CHARTS: tuple[Chart, ...] = (
    Chart(
        id="decode",
        title="Decode throughput by engine, offload and quantization",
        kind="fastest",
        y=("decode_tok_per_s",),
        by=("model", "engine", "offload", "quant"),
        definition="The fastest run of each group. decode_tok_per_s is B · (G − 1) / (total − ttft_s): B sequences of G "
        "generated tokens, without the first token; the median of the measured passes.",
        drawn="The runs of a group have one model, engine, offload target and quantization, whatever their sequences, prompts "
        "and machines: filter to compare like with like.",
    ),
    Chart(
        id="bound",
        title="Fraction of the bound",
        kind="bars",
        y=("fraction_of_bound", "prefill_fraction_of_bound"),
        definition="The time that no run of the same plan can beat, divided by the measured median: of a decode step, and of "
        "prefill. 100 % is the limit of the machine. Absent where a rate of the machine is not known.",
    ),
    Chart(
        id="batch",
        title="Decode throughput against batch size",
        kind="points",
        x="sequences",
        y=("decode_tok_per_s",),
        definition="One point for each run. The batch is B, the sequences of a pass over all GPUs and micro-batches.",
        drawn="Lines join the fastest at each batch size of the same model, engine, offload target, quantization, KV cache, "
        "prompt and machine.",
    ),
    Chart(
        id="pareto",
        title="Throughput against tokens per second of a user",
        kind="frontier",
        x="tok_per_s_per_user",
        y=("decode_tok_per_s",),
        definition="Decode tokens per second of all sequences together, against those of one sequence: 1 / tpot_p50_s, one "
        "over the median decode step.",
        drawn="The dashed line of a model joins its runs that no other run of the model beats in both: the Pareto frontier.",
    ),
    Chart(
        id="steps",
        title="Step time over tokens",
        kind="timelines",
        definition="Seconds from one token of all sequences to the next, the median over the measured passes. The first "
        "step leads from the first generated token to the second.",
        drawn="Runs that have steps, at most 200 of the whole page; of long ones each point is the median of neighbouring "
        "steps.",
    ),
    Chart(
        id="failures-chart",
        title="Failures",
        kind="failures",
        definition="Runs that are not ok, by status and kind of error.",
        drawn="A run that is under way counts as killed.",
    ),
    Chart(
        id="memory",
        title="Memory peaks",
        kind="bars",
        y=("gpu_peak_bytes", "host_peak_bytes", "disk_peak_bytes"),
        definition="GPU: allocated on one GPU while measuring, the largest of all ranks. Host: resident in all processes of "
        "the run together, at any time. Disk: in the run's own folder, at any time.",
    ),
    Chart(
        id="load",
        title="Load time",
        kind="bars",
        y=("load_s",),
        definition="Seconds from an empty process group to a model that is ready; building operators is left out.",
    ),
)
