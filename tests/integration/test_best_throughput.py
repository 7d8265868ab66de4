"""`experiment=best-throughput` and `workload.batch_size=auto` as real runs on the CPU, of a machine written down by hand."""

import json
import re
import shlex

import cli as command_line
import pytest
from cli import Cli
from rich.console import Console

from zi_experiments.results.sinks import search_commands

HERE = """
name: here
device: cpu
gpu: null
num_gpus: 1
memory_gib: null
host_memory_gib: 0.1
cpu_threads: null
dtypes: null
ceilings: {link_bytes_per_s: null, hbm_bytes_per_s: 1.0e+10, flops: 1.0e+11, disk_bytes_per_s: null, source: by hand}
calibration:
  link_back_bytes_per_s: null
  link_both_bytes_per_s: null
  link_pageable_bytes_per_s: null
  pin_bytes_per_s: null
  host_bytes_per_s: 1.0e+10
  disk_write_bytes_per_s: null
  gemm_flops: {float16: {1: 1.0e+9, 64: 5.0e+10}, bfloat16: {1: 1.0e+9, 64: 5.0e+10}}
  attention_flops: null
  cache_bytes_per_s: null
  host_read_bytes_per_s: null
  host_layer_s: null
  host_layer_busy_s: null
  link_busy_bytes_per_s: null
  host_experts_bytes_per_s: null
  expand_elements_per_s: null
  layer_s: 1.0e-3
  step_s: 1.0e-3
  moments: null
"""
QUICK = ("hardware=here", "engine=stream", "quant=fp16", "tracking=none", "verify=off")


@pytest.fixture(scope="module")
def cli(tmp_path_factory):
    cli = Cli(tmp_path_factory.mktemp("best"))
    (cli.folder / "choices" / "hardware").mkdir()
    (cli.folder / "choices" / "hardware" / "here.yaml").write_text(HERE)
    return cli


SEARCH = ("experiment=best-throughput", *QUICK, "search.rank=0,1,99", "workload.gen_len=4", "tracking.tags=[a,'b c']")


@pytest.fixture(scope="module")
def searched(cli):
    """The search, carried out: what it said."""
    done = cli.run(*SEARCH)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(cli):
    return sorted((r for r in cli.results() if "sweeps" in str(r["folder"])), key=lambda r: r["folder"].name)


def test_each_candidate_leaves_a_record_of_what_was_decided(cli, searched):
    results = records(cli)

    assert [result["status"] for result in results] == ["ok", "ok"]
    decided = [
        (result["config"]["workload"]["batch_size"], result["config"]["workload"]["micro_batches"])
        for result in results
    ]
    assert len(set(decided)) == 2
    for result, (size, micro_batches) in zip(results, decided, strict=True):
        assert result["plan"]["batch_size"] == size
        assert result["plan"]["sequences"] == size * micro_batches
        assert result["plan"]["prediction"]["total_tok_per_s"] > 0
        assert result["config"]["workload"]["repeats"] == 1, "as the experiment says"
        assert result["config"]["workload"]["prompt_len"] == 8, "as the command line says"
        assert result["metrics"]["total_tok_per_s"] > 0
        assert result["metrics"]["decode_prediction_error"] is not None
    predicted = [result["plan"]["prediction"]["total_tok_per_s"] for result in results]
    assert predicted[0] * 1.03 >= predicted[1]


def test_a_rank_that_is_too_high_is_skipped(searched, cli):
    assert re.search(r"^skipped \S+: the search has no candidate of rank 99$", searched, re.MULTILINE)
    assert "skipped" not in searched[searched.index("Which batch size") :]


def command_of(text, name):
    [command] = re.findall(rf"^{name}: (.*)$", text, re.MULTILINE)
    return shlex.split(command)


def test_each_candidate_is_shown_with_its_command_the_best_first(cli, searched):
    table = searched[searched.index("Which batch size") :]
    best = max(records(cli), key=lambda result: result["metrics"]["total_tok_per_s"])

    for result in records(cli):
        assert f"{result['metrics']['total_tok_per_s']:,.2f}" in table
        assert f"{100 * result['metrics']['decode_prediction_error']:.1f} %" in table
    other = min(records(cli), key=lambda result: result["metrics"]["total_tok_per_s"])
    for name, result in (("best", best), ("2", other)):
        command = command_of(searched, name)
        assert command[:4] == ["python", "-m", "zi_experiments", "--config-dir"]
        assert f"workload.batch_size={result['config']['workload']['batch_size']}" in command
        assert f"workload.micro_batches={result['config']['workload']['micro_batches']}" in command
        typed = [word for word in SEARCH if not word.startswith("search.rank")]
        assert set(typed) <= set(command), "what was typed"


def test_the_command_of_a_candidate_runs_it_alone(cli, searched):
    done = command_line.run([*command_of(searched, "2")[1:], "plan_only=true"], cli.folder, cli.environment())
    second = min(records(cli), key=lambda result: result["metrics"]["total_tok_per_s"])

    assert done.returncode == 0, done.stdout + done.stderr
    [written] = [p for p in cli.folder.glob("outputs/*/*/plan.json") if "sweeps" not in str(p)]
    planned = json.loads(written.read_text())
    assert planned["plan"]["kv_cache_bytes"] == second["plan"]["kv_cache_bytes"]
    assert planned["plan"]["prediction"]["total_tok_per_s"] == second["plan"]["prediction"]["total_tok_per_s"]
    assert planned["config"]["workload"] == second["config"]["workload"], "with the values of the experiment"


def test_run_again_a_search_keeps_what_it_has(cli, searched):
    before = [result["run"]["id"] for result in records(cli)]
    done = cli.run(*SEARCH)

    assert done.returncode == 0, done.stdout + done.stderr
    assert [result["run"]["id"] for result in records(cli)] == before
    assert done.stdout.count("kept ") >= 2
    assert "measure:" not in done.stdout
    assert command_of(done.stdout, "best") == command_of(searched, "best")


def test_a_run_with_the_largest_batch_records_which_that_was(cli):
    done = cli.run(*QUICK, "workload.batch_size=auto", "hardware.host_memory_gib=0.05", "workload.prompt_len=16")

    assert done.returncode == 0, done.stdout + done.stderr
    [result] = [result for result in cli.results() if "sweeps" not in str(result["folder"])]
    size = result["plan"]["batch_size"]
    assert size == result["plan"]["sequences"] == result["config"]["workload"]["batch_size"] > 1
    assert "workload.batch_size=auto" in result["run"]["command"]
    [host] = result["plan"]["memory"]
    assert 0.95 * 0.05 * 2**30 < host["total"] <= host["available"] == int(0.05 * 2**30)
    assert f"{size} × (16 + 3) tokens" in done.stdout
    ttft = result["samples"]["ttft_s"][0]
    assert result["metrics"]["prefill_tok_per_s"] == pytest.approx(size * 16 / ttft)


# --- the table, of records made up ----------------------------------------------------------------------------------

COMMAND = "python -m zi_experiments -m experiment=best-throughput"


def job(
    overrides,
    rate,
    *,
    rank=0,
    sequences=8,
    predicted=100.0,
    engine="stream",
    resident=0,
    kv="gpu",
    status="ok",
    command=COMMAND,
):
    config = {
        "search": {"rank": rank},
        "workload": {"batch_size": sequences, "micro_batches": 1},
        "kv_cache": {"device": kv},
        "offload": {"resident": resident},
        "engine": {"name": engine},
    }
    plan = {"sequences": sequences, "prediction": {"total_tok_per_s": predicted}}
    metrics = None if rate is None else {"total_tok_per_s": rate}
    run = {"command": command}
    return list(overrides), {"config": config, "plan": plan, "metrics": metrics, "status": status, "run": run}


def shown(show, *jobs):
    console = Console(width=200, record=True, quiet=False)
    with console.capture() as captured:
        show(list(jobs), console)
    return captured.get()


def test_where_nothing_was_measured_nothing_is_best():
    text = shown(search_commands.show_commands, job([], None, status="oom"), job([], None, status="error"))

    assert [line.partition(":")[0] for line in text.splitlines()] == ["1", "2"]


def test_a_command_has_what_was_typed_and_what_was_decided_once():
    typed = ("experiment=best-throughput", "model=opt-13b", "kv_cache=cpu", "search.rank=3", "workload.batch_size=5")
    text = shown(
        search_commands.show_commands,
        job([*typed, "plan_only=true"], 9.0, resident="auto", sequences=12),
        job(typed, 3.0),
    )

    best, second = text.splitlines()
    assert best == (
        "best: python -m zi_experiments experiment=best-throughput model=opt-13b workload.batch_size=12 kv_cache=gpu "
        "workload.micro_batches=1 offload.resident=auto hydra.mode=RUN"
    )
    assert second.startswith(
        "2: python -m zi_experiments experiment=best-throughput model=opt-13b workload.batch_size=8 "
    )


@pytest.mark.parametrize("flag", ["--config-dir '/my choices'", "--config-dir='/my choices'", "-cd '/my choices'"])
def test_the_command_finds_the_choices_of_the_user(flag):
    assert "best: python -m zi_experiments --config-dir '/my choices' workload." in shown(
        search_commands.show_commands, job([], 9.0, command=f"{COMMAND} {flag} hardware=mine")
    )


def test_what_another_engine_does_not_know_is_not_in_the_command():
    text = shown(search_commands.show_commands, job([], 9.0, engine="deepspeed"))

    assert text.splitlines()[-1].endswith("workload.batch_size=8 kv_cache=gpu hydra.mode=RUN")


@pytest.mark.parametrize(
    ("search", "is_one"),
    [({"rank": 0}, True), ({"rank": 5}, True), ({"rank": None}, False), ("anything", False), (None, False)],
    ids=str,
)
def test_a_search_is_told_by_its_ranks(search, is_one):
    assert search_commands.is_search([([], {"config": {"search": search}})]) is is_one
    assert search_commands.is_search([([], {"config": {}}), ([], {"config": {"search": search}})]) is is_one
