"""Records that nobody has measured, in the form of one that was: `record.json`.

`python tests/helpers/made_up.py FOLDER 10000` writes so many; then time `python -m zi_experiments.report FOLDER`.
"""

import json
import random
import sys
from copy import deepcopy
from itertools import product
from pathlib import Path
from statistics import median

REAL = json.loads(Path(__file__).with_name("record.json").read_text())
GRID = list(product(("opt-125m", "opt-13b", "llama-3.1-8b", "mixtral-8x7b"), ("deepspeed", "stream", "accelerate"),
                    ("none", "cpu", "nvme"), ("fp16", "int8", "int4"), (1, 2, 4, 8, 16, 32)))  # fmt: skip
FAILED = {
    "oom": ("OutOfMemory", "the GPU ran out of memory while loading"),
    "refused": ("ConfigError", "opt-13b needs 26 GB on each GPU and each has 16 GB: pass offload=cpu"),
    "killed": ("SIGKILL", "a worker was killed"),
    "error": ("VerificationFailed", "verification failed: layer 3 differs"),
}


def record(
    *, engine="stream", offload="cpu", quant="fp16", model="opt-125m", batch_size=2, step_s=0.1, passes=1, steps=2, noise=0.0,
    seed=0, status="ok", **changes,
):  # fmt: skip
    """A record whose figures follow from its times, up to `noise` from one time to the next; `changes` are top-level keys."""
    rng = random.Random(seed)
    made = deepcopy(REAL)
    made["choices"] |= {"engine": engine, "offload": offload, "quant": quant, "model": model}
    for group, name in (("engine", engine), ("offload", offload), ("quant", quant), ("model", model)):
        made["config"][group]["name"] = name
    made["config"]["workload"] |= {"batch_size": batch_size, "gen_len": steps + 1, "repeats": passes}
    made["plan"] |= {"batch_size": batch_size, "sequences": batch_size}
    made["run"] |= {"id": f"{seed:012x}", "name": f"{model}-{offload}-{quant}"}
    measured(made, [[step_s * rng.uniform(1, 1 + noise) for _ in range(steps)] for _ in range(passes)])
    if status != "ok":
        kind, message = FAILED[status]
        error = {"type": kind, "message": message, "hint": None, "traceback": None}
        made |= {
            "status": status,
            "error": error,
            "metrics": None,
            "samples": None,
            "verification": None,
            "stored": None,
        }
    return made | changes


def measured(made, step_s):
    """Put these step times into a record, for each pass, with prefill as long as two steps."""
    batch_size, prompt_len = made["plan"]["sequences"], made["config"]["workload"]["prompt_len"]
    ttft_s = [2 * steps[0] for steps in step_s]
    total_s = [first + sum(steps) for first, steps in zip(ttft_s, step_s, strict=True)]
    decode = [batch_size * len(steps) / sum(steps) for steps in step_s]
    prefill = [batch_size * prompt_len / first for first in ttft_s]
    total = [batch_size * (len(steps) + 1) / all_s for steps, all_s in zip(step_s, total_s, strict=True)]
    step = median(time for steps in step_s for time in steps)
    made["samples"] |= {"ttft_s": ttft_s, "total_s": total_s, "step_s": step_s}
    rates = {"prefill_tok_per_s": prefill, "decode_tok_per_s": decode, "total_tok_per_s": total}
    made["metrics"] |= {name: median(values) for name, values in rates.items()} | {
        "ttft_s": median(ttft_s), "tpot_p50_s": step, "tpot_p90_s": step, "tpot_p99_s": step,
        "fraction_of_bound": made["plan"]["bound"]["decode_step_s"] / step,
        "decode_prediction_error": made["plan"]["prediction"]["decode_step_s"] / step - 1,
        "spread": {name: [min(values), max(values)] for name, values in rates.items()},
    }  # fmt: skip


def records(count):
    """Records over engines, offload targets, quantizations and batch sizes; one in twenty has failed."""
    rng = random.Random(0)
    for number in range(count):
        model, engine, offload, quant, batch_size = GRID[number % len(GRID)]
        status = rng.choice(list(FAILED)) if number % 20 == 19 else "ok"
        yield record(
            model=model, engine=engine, offload=offload, quant=quant, batch_size=batch_size, status=status, seed=number,
            step_s=rng.lognormvariate(-2, 1), passes=3, steps=31, noise=0.2,
        )  # fmt: skip


def write(folder, made, name="result.json"):
    """A record as a file in a folder of its own, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(made, indent=2))
    return folder


if __name__ == "__main__":
    for number, made in enumerate(records(int(sys.argv[2]))):
        write(Path(sys.argv[1]) / f"{number}-{made['run']['name']}", made)
