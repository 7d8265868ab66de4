import re
import socket

import pytest
import torch

from zi_experiments import distributed
from zi_experiments.config import ConfigError

LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def launched(monkeypatch):
    """`launched(name=value)` → the variables of a launcher, and no others of them."""

    def launched(**variables):
        for name in (*LAUNCHED, "MASTER_PORT"):
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


def test_a_launcher_that_has_set_only_some_variables_is_refused(launched):
    launched(RANK="0", WORLD_SIZE="2")

    with pytest.raises(ConfigError, match=r"only RANK, WORLD_SIZE of .* are set: set all of them \(torchrun does\)"):
        distributed.init("cpu")
