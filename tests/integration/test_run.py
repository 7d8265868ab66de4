"""Whole runs through the command line: real DeepSpeed on the CPU, real disk, real W&B files."""

import json
import re
import socket
import subprocess
from statistics import median

import pytest
import wandb_file
from cli import Cli


@pytest.fixture
def cli(tmp_path):
    return Cli(tmp_path)


def test_a_sweep_leaves_a_record_and_a_wandb_run_for_each_job(cli):
    done = cli.run("-m", "offload=none,cpu,nvme", "quant=fp16,int4", "workload.gen_len=4", "workload.repeats=2")

    assert done.returncode == 0, done.stdout + done.stderr
    results = cli.results()
    assert len(results) == 6
    assert {(r["choices"]["offload"], r["choices"]["quant"]) for r in results} == {
        (offload, quant) for offload in ("none", "cpu", "nvme") for quant in ("fp16", "int4")
    }
    groups = set()
    for result in results:
        assert result["status"] == "ok"
        assert result["error"] is None
        check_figures(result, batch=2, prompt=8, gen=4, repeats=2)
        check_wandb(result, wandb_file.read(result["folder"]))
        groups.add(result["run"]["group"])
    assert len(groups) == 1
    by_choice = {(r["choices"]["offload"], r["choices"]["quant"]): r for r in results}
    for quant in ("fp16", "int4"):
        on_disk = by_choice["nvme", quant]
        assert on_disk["metrics"]["disk_peak_bytes"] >= on_disk["plan"]["placement"]["nvme_bytes"] > 0
        assert by_choice["cpu", quant]["metrics"]["disk_peak_bytes"] == 0
        assert not (on_disk["folder"] / "offload").exists() or not list((on_disk["folder"] / "offload").iterdir())
    assert by_choice["cpu", "int4"]["plan"]["weight_bytes"] < 0.4 * by_choice["cpu", "fp16"]["plan"]["weight_bytes"]


def check_figures(result, *, batch, prompt, gen, repeats):
    samples, metrics = result["samples"], result["metrics"]
    assert len(samples["ttft_s"]) == len(samples["total_s"]) == len(samples["step_s"]) == repeats
    assert len(samples["warmup"]) == 1
    assert all(len(steps) == gen - 1 for steps in samples["step_s"])
    for ttft, total, steps in zip(samples["ttft_s"], samples["total_s"], samples["step_s"], strict=True):
        assert total == pytest.approx(ttft + sum(steps))
    decode = [batch * (gen - 1) / sum(steps) for steps in samples["step_s"]]
    prefill = [batch * prompt / ttft for ttft in samples["ttft_s"]]
    assert metrics["decode_tok_per_s"] == pytest.approx(median(decode))
    assert metrics["prefill_tok_per_s"] == pytest.approx(median(prefill))
    assert metrics["host_peak_bytes"] > 200e6
    assert metrics["load_s"] == samples["load_s"] > 0
    assert result["verification"]["passed"]
    assert result["verification"]["max_rel_error"] == 0
    assert result["verification"]["reference"] == "layer by layer"
    placement = result["plan"]["placement"]
    assert sum(placement.values()) == result["plan"]["weight_bytes"]


def check_wandb(result, run):
    assert run["name"] == result["run"]["name"]
    assert run["group"] == result["run"]["group"]
    assert run["job_type"] == "benchmark"
    assert run["exit_code"] == 0
    assert run["summary"]["verified"] is True
    assert run["config"]["workload"]["gen_len"] == 4
    assert run["config"]["choices"] == result["choices"]
    for name in ("decode_tok_per_s", "prefill_tok_per_s", "ttft_s", "tpot_p50_s", "load_s", "host_peak_bytes"):
        assert run["summary"][name] == result["metrics"][name]
    steps = [row["step/tpot_s"] for row in run["history"] if "step/tpot_s" in row]
    assert steps == [step for one in result["samples"]["step_s"] for step in one]
    passes = [row["pass/ttft_s"] for row in run["history"] if "pass/ttft_s" in row]
    assert passes == [one["ttft_s"] for one in result["samples"]["warmup"]] + result["samples"]["ttft_s"]
    assert run["metrics"]["step/*"] == "step/index"
    assert run["metrics"]["pass/*"] == "pass/index"
    assert ["config.yaml", "ds_config.json", "result.json"] in run["artifacts"]


def test_console_says_what_ran_and_where_the_files_are(cli):
    """With a W&B server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = {"WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}", "WANDB_API_KEY": "0" * 40}
        done = cli.run("offload=nvme", f"offload.path={cli.folder / 'disk'}", WANDB_INIT_TIMEOUT="1", **server)

    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = cli.results()
    assert re.search(r"W&B: offline \(.*\); wandb sync outputs/", done.stdout)
    assert wandb_file.read(result["folder"])["exit_code"] == 0
    for text in (
        "tiny-nvme-int4",
        "quantized to 4 bits",
        "wandb sync",
        "disk: needs",
        "load: done in",
        "measure: done in",
    ):
        assert text in done.stdout
    for text in ("prefill", "decode", "time to first token", "host peak", "disk peak", "loaded in"):
        assert text in done.stdout
    assert f"record: {result['folder'].relative_to(cli.folder)}/result.json" in done.stdout
    assert not list((cli.folder / "disk").iterdir())
    assert json.loads((result["folder"] / "ds_config.json").read_text()) == result["ds_config"]


def test_two_ranks_share_the_batch(cli):
    done = cli.run("hardware.num_gpus=2", "tracking=none", "quant=fp16")

    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = cli.results()
    check_figures(result, batch=2, prompt=8, gen=3, repeats=1)
    assert done.stdout.count("measure: done") == 1, "only rank 0 speaks"


def test_the_reference_profile_runs_and_needs_no_console(cli):
    command = cli.command("engine.profile=reference", "tracking.mode=offline")
    shell = ["bash", "-c", '"$@" >/dev/full 2>&-', "bash", *command]
    done = subprocess.run(shell, cwd=cli.folder, env=cli.environment(PYTHONIOENCODING="ascii"))

    assert done.returncode == 0
    (result,) = cli.results()
    assert result["status"] == "ok"
    assert wandb_file.read(result["folder"])["exit_code"] == 0
    assert "leaf_module" not in cli.results()[0]["ds_config"]["zero_optimization"]


def test_a_refused_run_is_a_record_with_one_line(cli):
    done = cli.run("workload.prompt_len=600")

    assert done.returncode == 1
    (result,) = cli.results()
    assert result["status"] == "refused"
    assert result["metrics"] is None
    assert "512 positions" in result["error"]["message"]
    assert "Traceback" not in done.stdout + done.stderr
    assert "pass workload.prompt_len=509" in done.stdout


def test_a_wandb_failure_costs_a_warning_and_nothing_else(cli):
    done = cli.run(
        "tracking.mode=online", "tracking.project=a/b/c", WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9"
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert cli.results()[0]["status"] == "ok"
    assert "WandbSink failed" in done.stderr


def test_plan_only_measures_nothing(cli):
    done = cli.run("plan_only=true", "model=opt-175b", "offload=nvme", "quant=int4", "hardware=h200")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "98.2" in done.stdout
    assert cli.results() == []


def test_a_sweep_goes_on_after_a_failed_job(cli):
    named = {"WANDB_RUN_ID": "shared", "WANDB_PROJECT": "theirs", "WANDB_TAGS": "a,b", "WANDB_JOB_TYPE": "night"}
    done = cli.run("-m", "quant.group_size=64,100,32", "tracking.mode=offline", **named)

    assert done.returncode == 1
    assert [result["status"] for result in cli.results()] == ["ok", "refused", "ok"]
    assert "Error executing job" not in done.stderr
    runs = [wandb_file.read(result["folder"]) for result in cli.results() if result["status"] == "ok"]
    assert len({run["id"] for run in runs} | {"shared"}) == 3
    assert done.stdout.count("WANDB_RUN_ID=shared is ignored") == 1
    for run in runs:
        assert (run["project"], run["job_type"], run["tags"][:2]) == ("theirs", "night", ["a", "b"])
    table = done.stdout[done.stdout.index("3 runs") :]
    for group_size, status in ((64, "ok"), (100, "refused"), (32, "ok")):
        assert re.search(rf"quant.group_size={group_size} .*{status}", table)
