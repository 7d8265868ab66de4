"""`plan_only=true` through the real command line: seconds, no weights, no CUDA, and nothing left behind."""

import re
import time

import pytest
import remote_code
import tiny
from cli import Cli

from zi_experiments.report import reading

H200 = ("plan_only=true", "hardware=h200", "hardware.host_memory_gib=400", "tracking=none")


@pytest.fixture
def cli(tmp_path):
    return Cli(tmp_path)


def plan(cli, *arguments, **variables):
    """What it says of a model that is much larger than what the process may take, and its exit code."""
    began = time.monotonic()
    done = cli.run(*arguments, data_bytes=3 << 30, CUDA_VISIBLE_DEVICES="", **variables)
    assert time.monotonic() - began < 180  # seconds, on a machine that is busy with other tests
    assert "Traceback" not in done.stdout + done.stderr
    assert cli.results() == []
    assert not list(cli.folder.rglob("offload"))
    return done.returncode, done.stdout


def row(text, label):
    """The amounts of a line of a table."""
    [line] = [line for line in text.splitlines() if re.match(rf"│ {label} +│", line)]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_a_plan_shows_what_goes_where_how_long_it_takes_and_what_would_help(cli):
    """OPT-175B in INT4 takes 98.2 GB, which a link of 63 GB/s brings in 1.56 s."""
    code, text = plan(cli, *H200, "model=opt-175b", "workload=zero-inference")

    assert code == 0, text
    gpu, host = row(text, "weights")
    assert host == "98.24 GB"
    assert gpu.endswith("MB")
    assert row(text, "total")[1] == "100.74 GB", "with 2.5 GB of the process"
    assert row(text, "available")[1] == "429.50 GB"
    assert row(text, "decode step") == ["1.56 s (vendor's rates)", "PCIe"], "and no prediction, which would be the same"
    assert "a decode step takes at least 1.56 s (vendor's rates), limited by PCIe\n" in text
    assert re.search(
        r"^faster \(by the lower bounds\): workload\.batch_size=32, 3\.\d\d × the tokens per second; "
        r"first token after 1\.56 s → 5\.\d\d s, then one each 1\.56 s → 1\.56 s$",
        text,
        re.MULTILINE,
    ), text
    assert len(re.findall("^faster", text, re.MULTILINE)) <= 3


def test_what_goes_to_a_disk_that_nobody_has_seen_is_shown_without_what_is_free_there(cli):
    overrides = ("plan_only=true", "hardware=rtx-4090", "hardware.host_memory_gib=64", "tracking=none")
    code, text = plan(cli, *overrides, "model=llama-3.1-70b", "offload=nvme", "engine=stream")

    assert code == 0, text
    assert row(text, "weights")[2] == row(text, "total")[2] == "38.51 GB"
    assert row(text, "available")[2] == ""


def test_a_plan_that_cannot_fit_is_refused_with_what_does(cli):
    overrides = (*H200, "hardware.memory_gib=48", "model=opt-66b", "quant=fp16")
    code, text = plan(cli, *overrides, "offload=none")

    assert code == 1
    assert re.fullmatch(
        r"refused opt-66b needs 132\.7 GB on each GPU \(131\.4 GB weights\) and each has 51\.5 GB: "
        r"pass offload=cpu, or quant=int4, or offload=nvme\n",
        text,
    ), text
    assert plan(cli, *overrides, "offload=none", "offload=cpu")[0] == 0


def test_of_a_machine_that_was_not_measured_the_memory_is_shown_all_the_same(cli):
    code, text = plan(cli, "plan_only=true", "hardware=cpu", "quant=fp16", XDG_CACHE_HOME=str(cli.folder / "empty"))

    assert code == 0, text
    assert "no estimate of time, since hbm_bytes_per_s, flops of this machine are not known: pass" in text
    assert "at least" not in text
    assert row(text, "weights")[0].endswith("MB")
    assert "faster:" not in text
    assert not (cli.folder / "empty").exists(), "a plan measures nothing"


def test_the_batch_that_auto_stands_for_is_shown_by_what_it_takes(cli):
    """One sequence more would not fit."""
    overrides = (*H200, "model=opt-30b", "workload=zero-inference", "hardware.memory_gib=24")
    code, text = plan(cli, *overrides, "workload.batch_size=auto")

    assert code == 0, text
    assert float(row(text, "total")[0].removesuffix(" GB")) > 0.97 * float(
        row(text, "available")[0].removesuffix(" GB")
    )


def test_a_candidate_of_a_search_can_be_planned_alone(cli):
    """And a rank that is too high is no plan."""
    few = (*H200, "engine=stream", "model.architecture.num_hidden_layers=4", "model=opt-13b", "hardware.memory_gib=5")

    assert plan(cli, *few, "search.rank=0")[0] == 0
    code, text = plan(cli, *few, "search.rank=500")
    assert (code, text) == (1, "refused the search has no candidate of rank 500: pass search.rank=0\n")


def test_plans_of_a_sweep_are_one_table_and_are_left_for_a_report(cli):
    sweep = ("engine=stream,accelerate", "quant=fp16,int4", "model.architecture.num_hidden_layers=2")
    done = cli.run("-m", *H200, *sweep, COLUMNS="100")
    told = done.stdout

    assert done.returncode == 1, "a plan is refused"
    lines = [line for line in told.splitlines() if line.startswith("│")]
    assert [line.split()[1:4:2] for line in lines[:4]] == [
        *(["stream", "int4"], ["stream", "fp16"], ["accelerate", "fp16"], ["accelerate", "int4"])
    ]
    assert "refused: engine=accelerate keeps 16-bit weights" in " ".join(lines[3].replace("│", "").split())
    assert "memory" not in told
    assert len(told.splitlines()) < 20
    folder = cli.folder / re.search(r"^report: .* (\S+) --output", told, re.MULTILINE)[1]
    assert [run.row["status"] for run in reading.read([folder]).runs] == ["bound", "bound", "bound", "refused"]


def test_a_sweep_of_one_plan_shows_it_whole(cli):
    done = cli.run("-m", *H200, "quant=int4")

    assert done.returncode == 0, done.stdout + done.stderr
    assert row(done.stdout, "decode step")
    assert "plans" not in done.stdout


def test_in_a_sweep_an_unexpected_error_is_said_and_the_next_plan_shown(cli, tmp_path):
    """A model whose own code breaks where nothing else does."""
    remote_code.save(tmp_path / "broken", tmp_path / "mark")
    with (tmp_path / "broken" / "modeling_brought.py").open("a") as file:
        file.write(
            "    @classmethod\n    def _supports_default_dynamic_cache(cls):\n        raise LookupError('no cache today')\n"
        )
    tiny.config("llama").save_pretrained(tmp_path / "sound")

    done = cli.run(
        *("-m", *H200, "model=local", f"model.path={tmp_path}/broken,{tmp_path}/sound", "quant=fp16"),
        "trust_remote_code=true",
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )

    assert done.returncode == 1
    assert re.search("^error no cache today$", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert "2 plans" in done.stdout
    assert "Error executing job" not in done.stdout + done.stderr
