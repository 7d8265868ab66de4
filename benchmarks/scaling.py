"""What more GPUs and machines bring: docs/scaling.md, predicted from the rates of a measured GPU, and measured points.

python benchmarks/scaling.py [--output FILE]
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import chain
from statistics import median
from typing import Any

from predictions import DOCS, compare, error, machine_of, runs, write
from published import compose, described

from zi_experiments.cost_model.bound import lower_bound
from zi_experiments.cost_model.plan import Plan
from zi_experiments.cost_model.prediction import predict
from zi_experiments.planner import planning
from zi_experiments.planner.search import NOTICEABLE
from zi_experiments.system.machines import Machine

PAGE = DOCS / "scaling.md"
GPU = DOCS / "results" / "one-sequence-before-h100.json"  # has all rates of an H100
MEASURED = DOCS / "results" / "scaling-h100.json"
COPIES = DOCS / "results" / "scaling-copies-h100.json"
EACH = 8  # GPUs of a machine
GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)
HOST_BYTES = 2_000_000_000_000  # of a machine
SEQUENCES = 16  # of each GPU
MODELS = ("opt-175b", "deepseek-v3")
WORK = ("engine=stream", "offload=cpu", "quant=int4", "hardware=h100", "plan_only=true", "verify=off")
COLUMNS = (
    "GPUs",
    "machines",
    "sequences",
    "prefill s",
    "step s",
    "limited by",
    "tok/s",
    "GPU hours for a million tokens",
)
HEADER = f"""# More GPUs, more machines

Written by `make test ARGS="-n 0 tests/docs/test_scaling.py --update-golden"`, and compared with the code by every `make test`.

Weights that are streamed cross PCIe for every token, so a machine is as fast as all its links together.
[stream.md](stream.md#several-gpus) says how GPUs share the work, and [limits.md](limits.md#several-gpus-and-machines) how it
is predicted.

    python -m zi_experiments plan_only=true model=opt-175b quant=int4 engine=stream hardware=h100 \\
        hardware.num_gpus=64 launch.nnodes=8 hardware.host_memory_gib=2000 workload.batch_size=1024 hardware.price_per_hour=20

## Predicted

Machines of {EACH} GPUs with {HOST_BYTES / 1e12:.0f} TB of memory each, NVLink between the GPUs, and the rates of one H100
that was measured ([`{GPU.name}`](results/{GPU.name})). INT4 from host memory, {SEQUENCES} sequences on
each GPU, prompts of 512 tokens, 32 new ones.
"""
LIMITED = """
What limits them:

- **Up to a machine**: the links. Twice the GPUs bring a token's weights in half the time.
- **Computing**, when the copies of a share take less. Every GPU computes the whole model for its own prompts, so each expands
  all INT4 weights in every pass, however many GPUs there are. Larger batches use it better.
- **From a machine on**: each machine brings all weights for its own prompts, so a token takes as long as on one. Twice the
  machines have twice the throughput at twice the price. No network is counted: nothing crosses it but prompts and tokens.
- **Experts**: one GPU brings those that tokens are routed to. With several, all are brought, so a token takes longer with two
  GPUs than with one here.
- **The links between GPUs** would be the limit if N − 1 GPUs brought more than NVLink takes. The predictions have the
  vendor's 450 GB/s in one direction, and 7 · 55 are less. Two GPUs gathered 235 to 262 GB/s.
- **Host memory** is read by all links of a machine at once: eight of them take 440 GB/s, which a machine may not have.
  These predictions do not count it, since they have the rates of one GPU. A run measures its links while all are busy,
  and its own plan has that.

Eight such GPUs hold either model's INT4 weights together. An engine that splits matrices over GPUs would stream nothing there;
this project measures what to do with fewer.
"""


MEASURED_TEXT = f"""Two H100 of one machine, PCIe 5 and NVLink, `hardware=auto`, prompts of 128 tokens, 16 new ones
(DeepSpeed: 8): one GPU against two, with the same sequences in all ([`{MEASURED.name}`](results/{MEASURED.name})).
"Of all links" is what crosses in a decode step over what all links together can bring, by the best moment that was measured;
predictions take the mean. These are rates of one link alone, which two at the same time do not reach. What DeepSpeed's
all-gathers take is not in its prediction.
"""

COPIES_TEXT = f"""## What two GPUs wait for

Copies and gathers of OPT-13B, each between two CUDA events ([`{COPIES.name}`](results/{COPIES.name})). Links were
measured right before and after, with nothing beside them, in GB/s of each GPU. "Copying" is the share of a decode step
during which a GPU's copies run, and "rate" that of its copies. A step is the median of two passes without these events.

"""
COPIES_RESULT = """
**On another machine whose links had 0.96 of their rate together**, one command with one GPU and with two (`pair` in the
file): 135.0 and 67.1 ms a step, 2.01 times as fast, verified. That is 0.997 of what both links together were measured to
bring, 0.96 of twice one alone, and 0.6 % from the prediction. The GPUs gathered 256 GB/s.

**The links do not wait for gathers.** They copy during 99.3 % of a step or more, with the gathers beside them, and a step
without any gather, which computes nonsense, takes as long. (In one row the host once stopped for 0.2 s. With 4 blocks of
threads a gather takes as long as a copy.) Peer copies in place of the all-gather, or more slots, bring nothing beyond the
spread of one variant.

**The copies themselves are slower** with two GPUs: both links at once have 87 to 97 % of the rate of one alone, without any
model, and up to a tenth less in some runs. It changes within seconds: the same variant had 44.7 and 49.1 GB/s half a minute
apart, and single copies of 12 to 13 ms lie among those of 6. Others use the host of this virtual machine. It shows one NUMA
node, and which half of its cores touched the memory first made no difference. So two GPUs were 1.6 to 2.1 times as fast as
one. Bounds and predictions of a run on several GPUs have the rate of links that are busy together.

**A slab always has the same bytes** when its layer computes: 128 sums of each were equal on both GPUs. One sequence had other
tokens in one of eight passes all the same; products that add in no fixed order do that on one GPU, too.

**Launching takes longer** with two ranks: 0.7 to 1.6 ms of the host's time for a layer, where one rank takes 0.7 (with the
events). Why is not known. It hides behind copies of 1.6 ms and more; smaller slabs have to wait for it: OPT-1.3B in INT4
takes 38 ms a step on two GPUs.
"""


@cache
def gpu() -> Machine:
    """A machine of the GPU that was measured, with room for any plan."""
    case = next(iter(json.loads(GPU.read_text(encoding="utf-8"))["cases"].values()))
    peer = compose(("hardware=h100",)).hardware.peer_bytes_per_s
    return replace(machine_of(case), host_memory_bytes=HOST_BYTES, gpus_visible=EACH, peer_bytes_per_s=peer)


def plan_of(model: str, gpus: int) -> Plan:
    """The plan of a model on so many GPUs, in as few machines as they need."""
    work = ("workload=zero-inference", f"workload.batch_size={SEQUENCES * gpus}")
    size = (f"hardware.num_gpus={gpus}", f"launch.nnodes={-(-gpus // EACH)}")
    run = compose((*WORK, f"model={model}", *work, *size))
    return planning.build(run, described(run), gpu())


def page(measured: dict[str, Any]) -> str:
    """A table of predictions for each model, and one of what was measured."""
    made = HEADER
    for model in MODELS:
        made += f"\n### {model}\n\n{_table(COLUMNS, (_predicted(plan_of(model, gpus)) for gpus in GPUS))}"
    made += LIMITED
    if measured:
        columns = (
            "engine",
            "model",
            "weights",
            "GPUs",
            "each brings",
            "sequences",
            "step s",
            "predicted",
            "error",
            "of all links",
        )
        made += f"\n## Measured\n\n{MEASURED_TEXT}\n{_table(columns, _measured(measured))}"
    columns = ("weights", "how", "one link", "all links", "copying", "rate", "step s")
    made += f"\n{COPIES_TEXT}{_table(columns, _copied(json.loads(COPIES.read_text(encoding='utf-8'))))}{COPIES_RESULT}"
    return made


def _table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _predicted(plan: Plan) -> tuple[str, ...]:
    found, run = predict(plan), plan.run
    assert found.prefill_s
    assert found.decode_step_s
    assert found.total_tok_per_s
    hours = run.hardware.num_gpus / 3600 * 1e6 / found.total_tok_per_s
    return (
        *(f"{run.hardware.num_gpus}", f"{run.launch.nnodes}", f"{run.workload.sequences:,}"),
        *(f"{found.prefill_s:.2f}", f"{found.decode_step_s:.3f}", limit(plan, found.decode_step_s)),
        *(f"{found.total_tok_per_s:,.0f}", f"{hours:.2f}"),
    )


def limit(plan: Plan, step_s: float) -> str:
    """What a decode step waits for: copies, if it takes no longer than the links need."""
    if plan.storage.routes:
        return "links, then computing: routed experts only"
    bound = lower_bound(plan)
    assert bound.decode_step_s
    links = bound.limited_by == "link" and step_s < NOTICEABLE * bound.decode_step_s
    return "links" if links else "computing"


def _measured(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    cases = [case for case in found["cases"].values() if case["metrics"]]
    for case, one in zip(cases, runs(found), strict=True):
        compared = compare(one)
        run, link = compared.plan.run, case["metrics"]["link_bytes_per_s"]
        assert one.machine.ceilings.link_bytes_per_s
        assert compared.prediction.decode_step_s
        share = link / one.machine.ceilings.link_bytes_per_s / run.hardware.num_gpus
        yield (
            *(run.engine.name, run.model.name, f"{run.offload.name} {run.quant.name}", str(run.hardware.num_gpus)),
            "a share, gathered" if run.hardware.num_gpus > 1 and _has_shares(case["engine_config"]) else "all",
            *(str(run.workload.sequences), f"{one.step_s:.4f}", f"{compared.prediction.decode_step_s:.4f}"),
            *(f"{100 * error(compared.prediction.decode_step_s, one.step_s):+.1f} %", f"{share:.2f}"),
        )


def _has_shares(of_stream: dict[str, Any] | None) -> bool:
    return of_stream is None or bool(of_stream["share_slots"])  # DeepSpeed always has


def _copied(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, run in found["runs"].items():
        alone = _range(chain.from_iterable((run["links_alone_bytes_per_s"] or {}).values()))
        together = _range(chain.from_iterable(run["links_together_bytes_per_s"].values()))
        if not alone:
            alone, together = together, ""
        for one in run["variants"]:
            copying = min(rank["copying"] for rank in one["ranks"])
            rate, step_ms = (
                _range(rank["bytes_per_s"] for rank in one["ranks"]),
                median(chain.from_iterable(one["step_ms"])),
            )
            yield name, one["what"], alone, together, f"{100 * copying:.1f} %", rate, f"{step_ms / 1e3:.4f}"


def _range(rates: Iterable[float]) -> str:
    """The lowest and the highest rate in GB/s; nothing for none."""
    shown = [f"{rate / 1e9:.1f}" for rate in sorted(rates)]
    return " to ".join(dict.fromkeys([*shown[:1], *shown[-1:]]))


def load() -> dict[str, Any]:
    """What was measured with several GPUs; nothing if there is no such file."""
    return dict(json.loads(MEASURED.read_text(encoding="utf-8"))) if MEASURED.is_file() else {}


if __name__ == "__main__":
    write(__doc__, PAGE, lambda: page(load()))
