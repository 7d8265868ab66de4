"""What more GPUs and machines bring: docs/scaling.md, predicted from the rates of a measured GPU, and measured points.

python benchmarks/scaling.py [--output FILE]
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
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
- **The links between GPUs** would be the limit if N − 1 GPUs brought more than NVLink takes: 7 · 55 GB/s are below 450.
- **Host memory** is read by all links of a machine at once: eight of them take 440 GB/s, which a machine may not have. The
  prediction does not count it.

Eight such GPUs hold either model's INT4 weights together. An engine that splits matrices over GPUs would stream nothing there;
this project measures what to do with fewer.
"""


MEASURED_TEXT = f"""Two H100 of one machine, PCIe 5 and NVLink, `hardware=auto`, prompts of 128 tokens, 16 new ones: one GPU
against two, with the same sequences in all ([`{MEASURED.name}`](results/{MEASURED.name})).
"Of all links" is what crosses in a decode step over what all links together can bring, by the best moment that was measured;
predictions take the mean. The gathered run is of another job and machine: it took 19 % longer than predicted, and why is not
known yet. The predicted steps above, from two GPUs on, assume that gathering costs no time.
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
            *(run.model.name, f"{run.offload.name} {run.quant.name}", str(run.hardware.num_gpus)),
            "a share, gathered" if case["engine_config"]["share_slots"] else "all",
            *(str(run.workload.sequences), f"{one.step_s:.4f}", f"{compared.prediction.decode_step_s:.4f}"),
            *(f"{100 * error(compared.prediction.decode_step_s, one.step_s):+.1f} %", f"{share:.2f}"),
        )


def load() -> dict[str, Any]:
    """What was measured with several GPUs; nothing if there is no such file."""
    return dict(json.loads(MEASURED.read_text(encoding="utf-8"))) if MEASURED.is_file() else {}


if __name__ == "__main__":
    write(__doc__, PAGE, lambda: page(load()))
