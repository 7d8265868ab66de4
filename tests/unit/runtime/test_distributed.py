import re
import socket
import subprocess
import sys

import pytest
import torch

from zi_experiments import environment
from zi_experiments.config.schema import ConfigError
from zi_experiments.runtime import distributed

LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def launched(monkeypatch):
    """`launched(name=value)` → the variables of a launcher, and no others of them."""

    def launched(**variables):
        for name in (*LAUNCHED, "MASTER_PORT", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launched


def test_a_port_that_another_program_has_is_refused_with_one_that_is_free(launched):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        launched(**LAUNCHED, MASTER_PORT=address.partition(":")[2])

        with pytest.raises(ConfigError, match=f"MASTER_ADDR:MASTER_PORT is {address}, where another") as refused:
            distributed.init("cpu")

    assert "\n" not in str(refused.value)
    suggested = int(re.search(r"set MASTER_PORT=(\d+)", str(refused.value))[1])
    socket.create_server(("127.0.0.1", suggested)).close()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, None),  # what a shell may have kept
        (LAUNCHED | {"WORLD_SIZE": "2", "MASTER_PORT": "1"}, 2),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, None),  # a shell in an allocation
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
    ],
)
def test_a_launcher_is_known_by_its_variables(launched, variables, processes):
    launched(**variables)

    assert environment.launched_processes() == processes


def test_a_run_is_not_started_by_a_launcher(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        f"--log-dir={tmp_path}",
    ]
    done = subprocess.run(
        [*command, "-m", "zi_experiments", "quant=fp16", "plan_only=true"], capture_output=True, text=True, cwd=tmp_path
    )

    assert done.returncode == 1
    assert (
        "refused: a launcher has started 2 processes of this command, and it starts its own: "
        "type python -m zi_experiments quant=fp16 plan_only=true hardware.num_gpus=2"
    ) in done.stderr.splitlines()
    assert not (tmp_path / "outputs").exists()


def test_a_launcher_that_has_set_only_some_variables_is_refused(launched):
    launched(RANK="0", WORLD_SIZE="2")

    with pytest.raises(ConfigError, match=r"only RANK, WORLD_SIZE of .* are set: set all of them \(torchrun does\)"):
        distributed.init("cpu")
