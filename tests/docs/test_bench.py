"""benchmarks/bench.py: which cases there are, what of their runs is kept, and how targets are judged."""

import subprocess
import sys

import bench
import cases
import pytest
import torch

METRICS = {
    "decode_tok_per_s": 30.0,
    "link_bytes_per_s": 49.5e9,
    "tpot_p50_s": 0.5,
    "load_s": 61.0,
    "decode_prediction_error": -0.2,
    "prefill_prediction_error": 0.05,
}


def entry(**metrics):
    return {
        "metrics": METRICS | metrics,
        "ceilings": {"link_bytes_per_s": 50e9},
        "plan": {"num_parameters": 30 * 10**9, "kv_cache_bytes": 2**30},
        "engine_config": {"workspace_bytes": 2**30},
    }


SCALING = [one for gpus in (2, 8) for one in cases.scaling(gpus)]


@pytest.mark.parametrize("one", [*cases.CASES, *cases.CPU_CASES, *SCALING], ids=lambda one: one.name)
def test_every_case_is_a_run_that_can_be(compose_run, one):
    run = compose_run("workload=zero-inference", "tracking=none", *one.overrides)

    assert one.engine.partition("-")[0] == run.engine.name
    assert one.on_disk == (run.offload.device.value == "nvme")


def test_names_are_unique_and_are_those_that_targets_refer_to():
    for listed in (*cases.CASES, *cases.scaling(4)), cases.CPU_CASES:
        names = [one.name for one in listed]
        assert len(set(names)) == len(names)
    assert {"opt-13b-fp16/stream", "opt-13b-fp16/deepspeed-reference", "opt-13b-int4/deepspeed-reference"} <= {
        one.name for one in cases.CASES
    }


@pytest.mark.parametrize(
    ("target", "achieved", "met"),
    [
        (cases.of_link(0.98), 0.99, True),
        (cases.of_link(0.995), 0.99, False),
        (cases.of_links(0.98, 2), 0.495, False),
        (cases.figure("s to load", "load_s", 60, at_most=True), 61.0, False),
        (cases.times("another", 2.0, 10.0), 3.0, True),
        (cases.times("another", 2.0, "other"), 1.5, False),
        (cases.times("one that did not run", 2.0, "nowhere"), None, None),
        (cases.predicted(0.1)[0], 0.2, False),
        (cases.predicted(0.1)[1], 0.05, True),
        (cases.of_disk(0.5), None, None),  # which was not measured
        # 60 GB of weights and 2 GiB, of which 48 GiB stay
        (cases.of_best_placement(0.4, 48), (60e9 - 46 * 2**30) / 50e9 / 0.5, True),
    ],
    ids=lambda value: getattr(value, "what", None),
)
def test_targets_by_hand(target, achieved, met):
    judged = target.judge(entry(), {"other": entry(decode_tok_per_s=20.0)})

    assert judged["achieved"] == (None if achieved is None else pytest.approx(achieved))
    assert judged["met"] is met


def test_a_disk_is_given_what_was_really_read():
    one = entry(disk_bytes_per_s=1.8e9)
    one["ceilings"] |= {"disk_bytes_per_s": 2e9}

    assert cases.of_disk(0.9).judge(one, {}) == {"what": "of the disk", "at_least": 0.9, "achieved": 0.9, "met": True}


def test_a_case_without_figures_meets_nothing():
    assert cases.of_link(0.5).judge({"metrics": None}, {})["met"] is None


@pytest.mark.parametrize(
    ("drifts", "kept", "made"),
    [
        ([0.1, 0.0, 0.0], 0.1, 1),  # steady at once
        ([0.9, 0.15, 0.0], 0.15, 2),
        ([0.9, 0.3, 0.5], 0.3, 3),  # never: the least
    ],
)
def test_a_run_counts_if_the_machine_was_steady(drifts, kept, made):
    left = iter([{"metrics": METRICS, "drift": drift} for drift in drifts])

    assert bench.steadiest(left)["drift"] == kept
    assert len(list(left)) == len(drifts) - made


def test_a_run_that_failed_is_not_made_again():
    left = iter([{"metrics": None, "drift": 0.9}, {"metrics": METRICS, "drift": 0.0}])

    assert bench.steadiest(left)["metrics"] is None


@pytest.mark.parametrize(
    ("pairs", "change"),
    [([], 0.0), ([(2e9, 2e9)], 0.0), ([(2e9, 3e9)], 0.5), ([(3e9, 2e9)], 0.5), ([(1.0, 1.1), (4.0, 2.0)], 1.0)],
)
def test_the_largest_change_of_a_rate_counts_either_way(pairs, change):
    assert bench._change(pairs) == pytest.approx(change)


def test_nothing_that_is_kept_names_this_machine():
    typed = ["model=opt-13b", "offload=nvme", "offload.path=/mnt/of/mine"]
    record = {
        "status": "error",
        "error": {"type": "OSError", "message": "no room in /mnt/of/mine/zi-1"},
        "run": {"started_at": "2026-01-01T00:00:00"},
        "engine_config": {"folder": "/mnt/of/mine/zi-1", "slots": 3},
        "environment": {"cpu": "A Processor", "hostname": "mine"},
        **dict.fromkeys(("metrics", "samples", "plan", "verification")),
    }

    for kept in (
        bench.to_entry(record, "", typed, {}),
        bench.to_entry(None, "failed in /mnt/of/mine/weights\n", typed, {}),
    ):
        assert kept["status"] == "error"
        assert "mine" not in str(kept)


def test_the_list_needs_no_gpu():
    pairs = cases.scaling(max(2, torch.cuda.device_count()))
    for option, listed in ((), (*cases.CASES, *pairs)), (("--cpu",), cases.CPU_CASES):
        command = [sys.executable, bench.__file__, "--list", *option]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert [line.split()[0] for line in done.stdout.splitlines()] == [one.name for one in listed]


def test_a_name_that_no_case_has_is_refused():
    with pytest.raises(ValueError, match=r"no case is called opt-14b: pass --list"):
        bench.choose(["opt-14b", "opt-13b-fp16"], cases.CASES)


def test_a_pair_has_the_same_sequences(compose_run):
    """On one GPU there is nothing to compare."""
    assert cases.scaling(1) == ()
    made = cases.scaling(6)
    for one, all_of_them in zip(made[::2], made[1::2], strict=True):
        pair = [compose_run("workload=zero-inference", "tracking=none", *each.overrides) for each in (one, all_of_them)]
        assert [run.hardware.num_gpus for run in pair] == [1, 6]
        assert pair[0].workload == pair[1].workload
        assert pair[0].workload.batch_size % 6 == 0
