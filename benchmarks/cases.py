"""What `make bench-gpu` and `make bench-cpu` run, and what it should reach: how each target follows from what was measured."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Entry = dict[str, Any]  # what the JSON file says about a case
Entries = dict[str, Entry]  # by the case's name
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    what: str
    wanted: float
    achieved: Callable[[Entry, Entries], float | None]  # of a case that ran; None where another one is missing
    at_most: bool = False

    def judge(self, entry: Entry, entries: Entries) -> Entry:
        value = self.achieved(entry, entries) if entry["metrics"] else None
        met = None if value is None else (value <= self.wanted if self.at_most else value >= self.wanted)
        limit = "at_most" if self.at_most else "at_least"
        return {"what": self.what, limit: self.wanted, "achieved": value, "met": met}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    group: str
    engine: str
    overrides: tuple[str, ...]
    targets: tuple[Target, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.group}/{self.engine}"

    @property
    def on_disk(self) -> bool:
        return "offload=nvme" in self.overrides


def figure(what: str, name: str, wanted: float, *, at_most: bool = False) -> Target:
    """A target for one of the run's metrics."""
    return Target(what=what, wanted=wanted, achieved=lambda entry, _: entry["metrics"][name], at_most=at_most)


def off_by(name: str) -> Callable[[Entry, Entries], float | None]:
    """How far a prediction is off, either way."""

    def achieved(entry: Entry, _: Entries) -> float | None:
        error = entry["metrics"].get(name)
        return abs(error) if error is not None else None

    return achieved


def of_link(wanted: float) -> Target:
    def achieved(entry: Entry, _: Entries) -> float:
        return float(entry["metrics"]["link_bytes_per_s"] / entry["ceilings"]["link_bytes_per_s"])

    return Target(what="of the link", wanted=wanted, achieved=achieved)


def of_disk(wanted: float) -> Target:
    def achieved(entry: Entry, _: Entries) -> float | None:
        rate, ceiling = entry["metrics"].get("disk_bytes_per_s"), entry["ceilings"].get("disk_bytes_per_s")
        return rate / ceiling if rate and ceiling else None

    return Target(what="of the disk", wanted=wanted, achieved=achieved)


def of_best_placement(wanted: float, budget_gib: float) -> Target:
    """Against the bytes that no placement can keep out of the link: what does not fit beside what computing takes."""

    def achieved(entry: Entry, _: Entries) -> float:
        plan = entry["plan"]
        needed = 2 * plan["num_parameters"] + plan["kv_cache_bytes"] + entry["engine_config"]["workspace_bytes"]
        least = max(0, needed - budget_gib * GIB)
        return float(least / entry["ceilings"]["link_bytes_per_s"] / entry["metrics"]["tpot_p50_s"])

    return Target(what="of the best placement", wanted=wanted, achieved=achieved)


def times(what: str, wanted: float, other: str | float) -> Target:
    """Decoded tokens per second as a multiple of another case's, or of a number."""

    def achieved(entry: Entry, entries: Entries) -> float | None:
        mine = entry["metrics"]["decode_tok_per_s"]
        if isinstance(other, float):
            return float(mine / other)
        metrics = entries.get(other, {}).get("metrics")
        return mine / metrics["decode_tok_per_s"] if metrics else None

    return Target(what=f"× {what}", wanted=wanted, achieved=achieved)


def of_routed(wanted: float) -> Target:
    """The bytes of all experts that tokens were routed to, of what the link can bring in that time."""

    def achieved(entry: Entry, _: Entries) -> float:
        metrics = entry["metrics"]
        missed = metrics["link_bytes_per_s"] / (1 - metrics["expert_hit_rate"])
        return float(missed / entry["ceilings"]["link_bytes_per_s"])

    return Target(what="of the link, in routed bytes", wanted=wanted, achieved=achieved)


def of_whole_layers(wanted: float) -> Target:
    """Against bringing every expert for every token: the least time that the link takes for it."""

    def achieved(entry: Entry, _: Entries) -> float:
        whole_s = entry["plan"]["streamed_bytes_per_pass"] / entry["ceilings"]["link_bytes_per_s"]
        return float(whole_s / entry["metrics"]["tpot_p50_s"])

    return Target(what="× whole layers at the link's rate", wanted=wanted, achieved=achieved)


def of_prompt(wanted: float) -> Target:
    """Against the pass of the same run's prompt, which brings whole layers: as long as it takes no longer to compute."""

    def achieved(entry: Entry, _: Entries) -> float:
        return float(entry["metrics"]["ttft_s"] / entry["metrics"]["tpot_p50_s"])

    return Target(what="× whole layers, as the prompt takes", wanted=wanted, achieved=achieved)


def tok_per_s(wanted: float) -> Target:
    return figure("tok/s", "decode_tok_per_s", wanted)


def host_name(quant: str, dtype: str, sequences: int) -> str:
    return f"{dtype if quant == 'fp16' else quant}-{sequences}"


def host_targets(name: str, wanted: float | None) -> tuple[Target, ...]:
    """Against the same run with all layers and experts on the GPU: a choice that gains nothing may cost little."""
    other = f"host-{name}-gpu/stream"

    def prefill(entry: Entry, entries: Entries) -> float | None:
        metrics = entries.get(other, {}).get("metrics")
        return entry["metrics"]["ttft_s"] / metrics["ttft_s"] if metrics else None

    unchanged = Target(what="of the prefill's time with compute=gpu", wanted=1.03, achieved=prefill, at_most=True)
    return times("compute=gpu", wanted or 0.97, other), unchanged


REFERENCE = ("engine=deepspeed", "engine.profile=reference", "offload.pin_memory=true")
TUNED = ("engine=deepspeed", "engine.profile=tuned")
FLEXGEN_FP16, FLEXGEN_INT4 = 16.2, 35.8  # tok/s: FlexGen 0.1.8 with OPT-13B on an H200, 8 sequences, prompt 512


def workload(gen_len: int = 16, repeats: int = 2, warmup: int = 1) -> tuple[str, ...]:
    return (f"workload.gen_len={gen_len}", f"workload.repeats={repeats}", f"workload.warmup={warmup}")


def predicted(within: float) -> tuple[Target, ...]:
    return tuple(
        Target(
            what=f"error of the predicted {name}",
            wanted=within,
            achieved=off_by(f"{name}_prediction_error"),
            at_most=True,
        )
        for name in ("decode", "prefill")
    )


def case(
    group: str, engine: str, what: str, *more: str, targets: tuple[Target, ...] = (), within: float = 0.10
) -> Case:
    """`what` is model, offload and quantization in that order; predictions should be right within that share."""
    model, offload, quant = what.split()
    overrides = (f"model={model}", f"offload={offload}", f"quant={quant}", *more)
    return Case(group=group, engine=engine, overrides=overrides, targets=(*targets, *predicted(within)))


STREAM, SHORT = "engine=stream", workload(6, 1)
FP16_TARGETS = (
    of_link(0.99),
    figure("of the prefill bound", "prefill_fraction_of_bound", 0.95),
    times("deepspeed reference, pinned", 1.25, "opt-13b-fp16/deepspeed-reference"),
    times("FlexGen", 1.08, FLEXGEN_FP16),
)
INT4_TARGETS = (
    of_link(0.97),
    times("deepspeed reference, pinned", 2.0, "opt-13b-int4/deepspeed-reference"),
    times("FlexGen", 1.7, FLEXGEN_INT4),
)
PLACED_TARGETS = (of_best_placement(0.95, 48), figure("of the plan's bound", "fraction_of_bound", 0.95))
# tok/s of one sequence before experts were routed, packed weights multiplied and steps recorded, on an H100
BEFORE = {"opt-13b": 29.95, "qwen3-30b-a3b": 11.57}
SHORT_PROMPT = ("workload.prompt_len=128", *workload())
ONE = "workload.batch_size=1"
PROMPTS = ("workload.batch_size=8", "workload.prompt_len=512", "workload.gen_len=4")
OF_PREFILL = figure("of the prefill bound", "prefill_fraction_of_bound", 0.9)
CAPPED = (ONE, "offload.resident=auto")
FROM_DISK = (STREAM, ONE, "workload.prompt_len=128")
BLOCKS = "+model.architecture.quantization_config={quant_method:fp8,weight_block_size:[128,128]}"
WHOLE = ("workload.batch_size=64", "workload.prompt_len=128", *workload(6, 1))  # sequences use all experts of a layer
HOST = (  # (weights, type, sequences, multiple of `compute=gpu` to reach); float16 is reported
    ("fp16", "bfloat16", 1, 2.4),
    ("fp16", "bfloat16", 8, 2.0),
    ("fp16", "bfloat16", 16, 1.7),
    ("fp16", "float16", 1, None),
    ("fp16", "float16", 8, None),
    ("int4", "bfloat16", 1, 1.9),
    ("int4", "bfloat16", 4, 1.4),
    ("int4", "bfloat16", 8, 1.1),
)
MICRO_TARGETS = (times("one micro-batch", 7.0, "opt-13b-fp16/stream"),)
CASES = (
    case("opt-13b-fp16", "stream", "opt-13b cpu fp16", STREAM, *workload(), targets=FP16_TARGETS),
    case("opt-13b-fp16", "deepspeed-reference", "opt-13b cpu fp16", *REFERENCE, *workload(8, 3)),
    case("opt-13b-fp16", "deepspeed-tuned", "opt-13b cpu fp16", *TUNED, *workload(8, 3)),
    case("opt-13b-fp16", "accelerate", "opt-13b cpu fp16", "engine=accelerate", *workload(4, 3)),
    case("opt-13b-fp16", "fsdp", "opt-13b cpu fp16", "engine=fsdp", *workload(8, 3)),
    case("opt-13b-int4", "stream", "opt-13b cpu int4", STREAM, *workload(), targets=INT4_TARGETS),
    case("opt-13b-int4", "deepspeed-reference", "opt-13b cpu int4", *REFERENCE, *workload(repeats=3)),
    case("opt-13b-int4", "deepspeed-tuned", "opt-13b cpu int4", *TUNED, *workload(repeats=3)),
    case("opt-13b-resident", "stream", "opt-13b none int4", STREAM, *workload(repeats=1)),
    case(
        *("opt-175b-int4", "stream", "opt-175b cpu int4", STREAM, *SHORT),
        targets=(of_link(0.95), figure("s to load", "load_s", 60, at_most=True)),
    ),
    case(
        *("opt-30b-48gib", "stream", "opt-30b cpu fp16", STREAM, "hardware.memory_gib=48", "offload.resident=auto"),
        *workload(),
        targets=PLACED_TARGETS,
    ),
    *(
        case(f"experts-{name}", "stream", what, STREAM, *SHORT_PROMPT, *more, targets=targets)
        for name, what, more, targets in (
            (
                "mixtral-1",
                "mixtral-8x7b cpu int4",
                (ONE,),
                (of_routed(0.85), of_whole_layers(3.5), of_prompt(3.5), tok_per_s(7.4)),
            ),
            ("mixtral-8", "mixtral-8x7b cpu int4", ("workload.batch_size=8",), (of_whole_layers(0.97),)),
            ("mixtral-32", "mixtral-8x7b cpu int4", ("workload.batch_size=32",), (of_whole_layers(0.9),)),
            ("mixtral-64", "mixtral-8x7b cpu int4", ("workload.batch_size=64",), (of_whole_layers(0.9),)),
            ("mixtral-512x8", "mixtral-8x7b cpu int4", PROMPTS, (OF_PREFILL,)),
            ("mixtral-17gib", "mixtral-8x7b cpu int4", (*CAPPED, "hardware.memory_gib=17"), (tok_per_s(14),)),
            ("qwen3-1", "qwen3-30b-a3b cpu int4", (ONE,), (of_whole_layers(5), of_prompt(5), tok_per_s(17))),
            ("qwen3-8", "qwen3-30b-a3b cpu int4", ("workload.batch_size=8",), (of_whole_layers(1.8),)),
            ("qwen3-64", "qwen3-30b-a3b cpu int4", ("workload.batch_size=64",), (of_whole_layers(0.9),)),
            ("qwen3-512x8", "qwen3-30b-a3b cpu int4", PROMPTS, (OF_PREFILL,)),
            (
                *("qwen3-11.5gib", "qwen3-30b-a3b cpu int4", (*CAPPED, "hardware.memory_gib=11.5")),
                (of_whole_layers(8), of_prompt(8), tok_per_s(27)),
            ),
            (
                *("gpt-oss-24gib", "gpt-oss-120b cpu int4", (*CAPPED, "hardware.memory_gib=24")),
                (of_whole_layers(12), of_prompt(12)),
            ),
        )
    ),
    *(
        case(
            *(f"host-{host_name(quant, dtype, sequences)}-{compute}", "stream", f"opt-13b cpu {quant}", STREAM),
            *SHORT_PROMPT,
            *(f"hardware.dtypes=[{dtype}]", f"workload.batch_size={sequences}", f"offload.compute={compute}"),
            targets=host_targets(host_name(quant, dtype, sequences), wanted) if compute == "auto" else (),
        )
        for quant, dtype, sequences, wanted in HOST
        for compute in ("gpu", "auto")
    ),
    *(
        case(
            *(f"host-experts-{name}-{compute}", "stream", f"{model} cpu int4", STREAM, *SHORT_PROMPT, ONE),
            f"offload.compute={compute}",
            targets=host_targets(f"experts-{name}", wanted) if compute == "auto" else (),
        )
        for name, model, wanted in (("mixtral", "mixtral-8x7b", 1.3), ("qwen3", "qwen3-30b-a3b", None))
        for compute in ("gpu", "auto")
    ),
    *(
        case(
            *(f"one-{name}", "stream", f"{name} none int4", STREAM, *SHORT_PROMPT, ONE),
            targets=(times("before", 2.0, before),),
        )
        for name, before in BEFORE.items()
    ),
    # whole layers in the format in which a model is published, and in 16 bits
    *(
        case(f"native-{model}", engine, f"{model} cpu {quant}", STREAM, *more, *WHOLE, targets=targets)
        for model, more in (("gpt-oss-20b", ()), ("qwen3-30b-a3b", (BLOCKS,)))
        for engine, quant, targets in (
            ("stream", "native", (of_link(0.97), times("16 bits", 1.7, f"native-{model}/stream-fp16"))),
            ("stream-fp16", "fp16", (of_link(0.97),)),
        )
    ),
    # verification has made four passes before the first that is measured, so that nothing is left to warm up
    case("opt-6.7b-nvme", "stream", "opt-6.7b nvme fp16", STREAM, *workload(4, 2, 0), targets=(of_disk(0.95),)),
    case("opt-6.7b-nvme", "deepspeed-tuned", "opt-6.7b nvme fp16", *TUNED, *workload(3, 1, 0)),
    case("opt-6.7b-nvme-int4", "stream", "opt-6.7b nvme int4", STREAM, *workload(6, 2, 0), targets=(of_disk(0.95),)),
    case("opt-6.7b-nvme-int4", "deepspeed-tuned", "opt-6.7b nvme int4", *TUNED, *workload(4, 1, 0)),
    # the least cache in host memory, and one that with the GPU's pool holds a half of the experts, when it is warm
    case(
        *("experts-mixtral-nvme", "stream", "mixtral-8x7b nvme int4", *FROM_DISK, *workload(8, 1, 0)),
        targets=(of_disk(0.9),),
    ),
    case(
        *("experts-mixtral-nvme-16gib", "stream", "mixtral-8x7b nvme int4", *FROM_DISK, *workload(8, 1)),
        *("offload.resident=auto", "hardware.memory_gib=12", "hardware.host_memory_gib=16"),
        targets=(times("the least cache", 1.2, "experts-mixtral-nvme/stream"),),
    ),
    case(
        *("micro-batches", "stream", "opt-13b cpu fp16", STREAM, "workload.micro_batches=8", "kv_cache=gpu", *SHORT),
        targets=MICRO_TARGETS,
    ),
    case(
        *("kv-host", "stream", "opt-13b cpu fp16", STREAM, "workload.micro_batches=4", "kv_cache=cpu", *SHORT),
        targets=(figure("of the bound", "fraction_of_bound", 0.9),),
    ),
)

# each with one GPU and with all: what several links bring together, over what one brings as many times
SCALED = (
    ("opt-13b cpu fp16", 16, 0.97),
    ("opt-13b cpu int4", 8, 0.97),
    ("opt-66b cpu fp16", 16, 0.97),
    ("opt-175b cpu int4", 8, 0.97),
    ("mixtral-8x7b cpu int4", 32, 0.9),
    ("opt-30b nvme int4", 8, None),
)


def scaling(gpus: int) -> tuple[Case, ...]:
    """Pairs of one GPU against so many, with the same sequences in all; none for one GPU."""
    counts = (1, gpus) if gpus > 1 else ()
    return tuple(
        case(
            *("scaling", f"stream-{what.replace(' ', '-')}-{count}", what, STREAM, *SHORT_PROMPT),
            *(f"workload.batch_size={-(-sequences // gpus) * gpus}", f"hardware.num_gpus={count}"),
            targets=(of_links(wanted, count),) if wanted else (of_disk(0.95),),
        )
        for what, sequences, wanted in SCALED
        for count in counts
    )


def of_links(wanted: float, gpus: int) -> Target:
    """The bytes that all links brought, of what so many could."""

    def achieved(entry: Entry, _: Entries) -> float:
        return float(entry["metrics"]["link_bytes_per_s"] / entry["ceilings"]["link_bytes_per_s"] / gpus)

    return Target(what=f"of {gpus} links", wanted=wanted, achieved=achieved)


# a processor has no link to be measured against: how well its runs are predicted
ON_CPU = (
    "hardware=cpu",
    "workload.batch_size=4",
    "workload.prompt_len=128",
    *workload(8, 2),
)
CPU_CASES = tuple(
    case(f"opt-1.3b-{offload}-{quant}", name, f"opt-1.3b {offload} {quant}", *engine, *ON_CPU, within=0.25)
    for offload, quant, name, engine in (
        ("cpu", "fp16", "stream", (STREAM,)),
        ("cpu", "fp16", "deepspeed-reference", ("engine.profile=reference",)),
        ("cpu", "fp16", "deepspeed-tuned", TUNED),
        ("cpu", "fp16", "accelerate", ("engine=accelerate",)),
        ("cpu", "fp16", "fsdp", ("engine=fsdp",)),
        ("cpu", "int4", "stream", (STREAM,)),
        ("cpu", "int4", "deepspeed-reference", ("engine.profile=reference",)),
        ("cpu", "int4", "deepspeed-tuned", TUNED),
        ("nvme", "fp16", "stream", (STREAM,)),
        ("nvme", "fp16", "deepspeed-tuned", TUNED),
        ("nvme", "int4", "stream", (STREAM,)),
        ("nvme", "int4", "deepspeed-tuned", TUNED),
    )
)
