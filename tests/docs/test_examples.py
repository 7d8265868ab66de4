"""Every file of examples/, used as its README says."""

import json
import os
import subprocess
import sys
from dataclasses import fields

import cli
import pytest
from omegaconf import OmegaConf
from places import ROOT

from zi_experiments.config.schema import Calibration, Ceilings, Hardware, Model, Workload

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(*words)` → what `python` prints for them, all in one folder, where nobody is logged in to W&B."""
    folder = tmp_path_factory.mktemp("examples")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}

    def run(*words, code=0):
        around = kept | {"NETRC": str(folder / "netrc"), "COLUMNS": "200", "DS_ACCELERATOR": "cpu"}
        if words[0] == "-m":
            done = cli.run(list(words), folder, around)
        else:
            done = subprocess.run([sys.executable, *words], cwd=folder, env=around, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def sweep(run):
    """The experiment, carried out: what was printed, and its records by name."""
    printed = run("-m", "zi_experiments", "--config-dir", str(EXAMPLES), "experiment=my-experiment")
    found = [json.loads(path.read_text()) for path in run.folder.glob("outputs/sweeps/*/*/result.json")]
    return printed, {record["run"]["name"]: record for record in found}


def names(kind):
    return {field.name for field in fields(kind)}


def keys(path):
    return OmegaConf.to_container(OmegaConf.load(EXAMPLES / path))


def test_every_field_is_listed():
    hardware = keys("hardware/my-gpu.yaml")

    assert set(hardware) == names(Hardware)
    assert set(hardware["ceilings"]) == names(Ceilings)
    assert set(keys("model/my-model.yaml")) == names(Model)
    assert set(keys("experiment/my-experiment.yaml")["workload"]) == names(Workload)
    comments = (EXAMPLES / "hardware" / "my-gpu.yaml").read_text()
    assert [name for name in sorted(names(Calibration)) if name not in comments] == []


def test_hardware_is_planned_for(run):
    choices = ("hardware=my-gpu", "model=my-model", "engine=stream", "offload=cpu", "quant=int4")
    printed = run("-m", "zi_experiments", "--config-dir", str(EXAMPLES), "plan_only=true", *choices)

    assert "each GPU" in printed
    assert "a decode step takes at least" in printed
    assert "(vendor's rates)" in printed


def test_the_experiment_runs_with_the_model(sweep):
    printed, records = sweep

    assert set(records) == {"my-experiment-fp16", "my-experiment-int4"}
    for record in records.values():
        assert record["status"] == "ok"
        assert record["choices"]["model"] == "my-model"
        assert record["plan"]["num_layers"] == 4
    assert "my-experiment-int4" in printed
    assert keys("experiment/my-experiment.yaml")["question"]["text"] in " ".join(printed.split())


def test_records_are_read(run, sweep):
    header, *rows = run(str(EXAMPLES / "read_record.py"), "outputs").splitlines()

    assert header.split()[:2] == ["name", "status"]
    for line, (name, record) in zip(sorted(rows), sorted(sweep[1].items()), strict=True):
        assert line.split()[:3] == [name, "ok", f"{record['metrics']['decode_tok_per_s']:,.4g}"]


def test_a_record_of_a_refusal_is_read(run):
    command = ("-m", "zi_experiments", "--config-dir", str(EXAMPLES), "model=my-model", "workload.gen_len=0")
    run(*command, "hydra.run.dir=refused", code=1)
    printed = run(str(EXAMPLES / "read_record.py"), "refused/result.json")

    assert "refused" in printed.splitlines()[1]
    assert "workload.gen_len must be at least 1" in printed


def test_nothing_to_read(run):
    (run.folder / "empty").mkdir()

    assert "no result.json there" in run(str(EXAMPLES / "read_record.py"), "empty", code=1)
    assert "no .wandb file in empty" in run(str(EXAMPLES / "read_wandb.py"), "empty", code=1)


def test_an_offline_wandb_run_is_read(run, sweep):
    (file,) = run.folder.glob("outputs/sweeps/*/*-my-experiment-int4/wandb/offline-run-*/run-*.wandb")
    first, choices, *summary = run(str(EXAMPLES / "read_wandb.py"), str(file)).splitlines()
    figures = dict(line.strip().split(" = ") for line in summary)
    metrics = sweep[1]["my-experiment-int4"]["metrics"]

    assert first.startswith("my-experiment-int4: ")
    assert int(first.split()[1]) >= 2 * 7 + 3  # steps of two passes, and all passes
    assert "model=my-model" in choices.split()
    assert float(figures["decode_tok_per_s"]) == metrics["decode_tok_per_s"]
    assert figures["status"] == "ok"


def test_wandb_pieces_across_blocks(run, tmp_path):
    """A record longer than a block comes in pieces; one that was cut off by the end of the process is left out."""
    sys.path.insert(0, str(EXAMPLES))
    import read_wandb
    from wandb.proto.wandb_internal_pb2 import Record

    record = Record()
    record.run.display_name = "x" * 70_000
    data, payload, first = bytearray(b"\0" * 7), record.SerializeToString(), True
    while payload:
        room = 32768 - len(data) % 32768 - 7
        piece, payload = payload[:room], payload[room:]
        kind = (1 if first else 4) if not payload else (2 if first else 3)
        data += bytes(4) + len(piece).to_bytes(2, "little") + bytes([kind]) + piece
        first = False

    assert [each.run.display_name for each in read_wandb.records(bytes(data))] == ["x" * 70_000]
    assert list(read_wandb.records(bytes(data[:-1]))) == []
