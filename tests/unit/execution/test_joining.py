import pytest
from omegaconf import OmegaConf

from zi_experiments.execution import follower, launcher
from zi_experiments.execution.joining import Nodes
from zi_experiments.runtime import rendezvous


def test_a_launcher_that_fails_does_not_carry_out_the_command_itself(monkeypatch, capsys):
    """Hydra only warns of an exception in a callback, and would begin a run of its own here, beside the first one's."""

    def fail(*_):
        raise OSError("the folder is gone")

    second = rendezvous.Met(number=1, host="node0", interface=None, peers=[], hellos=[])
    monkeypatch.setattr(rendezvous, "meet", lambda *_: second)
    monkeypatch.setattr(launcher, "warm_up", lambda: None)
    monkeypatch.setattr(follower, "serve", fail)
    launch = {"nnodes": 2, "rdzv_endpoint": "node0:29500", "timeout_s": 1}

    with pytest.raises(SystemExit) as end:
        Nodes().on_run_start(OmegaConf.create({"launch": launch, "plan_only": False}))

    assert end.value.code == 1
    assert "the folder is gone" in capsys.readouterr().err
