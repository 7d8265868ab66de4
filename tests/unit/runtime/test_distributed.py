import os
import re
import socket
import subprocess
import sys
from dataclasses import astuple

import pytest
import torch

from zi_experiments import environment
from zi_experiments.config.schema import ConfigError
from zi_experiments.execution import joining
from zi_experiments.runtime import distributed

LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def launched(monkeypatch):
    """`launched(name=value)` → the variables of a launcher, and no others of them."""

    def launched(**variables):
        for name in (*FOUR, *STORE, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", *SRUN, *OPEN_MPI, *MPICH):
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


SRUN = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}
FOUR = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "7"}
STORE = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    ("variables", "found"),  # number, processes, number on its machine, machines, endpoint
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, None),  # what a shell may have kept
        (LAUNCHED | {"MASTER_PORT": "1"}, None),  # the only process
        (FOUR | STORE | {"LOCAL_WORLD_SIZE": "2"}, (3, 4, 1, 2, "node0:7", True, "1")),  # torchrun
        (FOUR | {"LOCAL_SIZE": "4"}, (3, 4, 1, 1, "node0:7", False, "0")),  # deepspeed
        (SRUN, (3, 4, 1, 2, None, False, "0")),
        (SRUN | {"MASTER_ADDR": "node0", "MASTER_PORT": "7"}, (3, 4, 1, 2, "node0:7", False, "0")),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # a shell in an allocation
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (2, 4, 0, 2, None, False, "0")),
        (MPICH, (1, 2, 1, 1, None, False, "0")),
    ],
)
def test_a_launcher_is_known_by_its_variables(launched, variables, found):
    launched(**variables)

    assert (astuple(told) if (told := environment.launched()) else None) == found


def test_what_a_launcher_says_becomes_settings(launched):
    launched(**FOUR, LOCAL_WORLD_SIZE="2", **STORE)

    typed = joining.take_launcher(["--local_rank=1", "quant=fp16", "hardware.num_gpus=8"])

    assert typed == ["quant=fp16", "hardware.num_gpus=8", "launch.nnodes=2", "launch.rdzv_endpoint=node0:7"]
    assert environment.distributed_variables() == {}, "they are not those of the workers"


def test_a_launcher_that_does_not_say_where_to_meet_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "zi_experiments", "quant=fp16"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=dict(os.environ) | SRUN | {"SLURM_PROCID": "0"},
    )

    assert done.returncode == 1
    assert "refused: a launcher has started 4 processes" in done.stderr
    assert "pass launch.rdzv_endpoint=node0:29500, for example" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_launcher_that_has_set_only_some_variables_is_refused(launched):
    launched(RANK="0", WORLD_SIZE="2")

    with pytest.raises(ConfigError, match=r"only RANK, WORLD_SIZE of .* are set: set all of them \(torchrun does\)"):
        distributed.init("cpu")
