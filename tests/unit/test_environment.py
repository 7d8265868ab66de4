import os
import subprocess

import pytest

from zi_experiments import environment


@pytest.mark.parametrize(
    ("said", "mode"),
    [
        (None, None),
        ("", None),
        (" ", None),
        ("offline", "offline"),
        ("OFFLINE", "offline"),
        ("dryrun", "offline"),
        ("Run", "online"),
        ("foo", "foo"),
    ],
)
def test_what_wandb_mode_means(monkeypatch, said, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if said is not None:
        monkeypatch.setenv("WANDB_MODE", said)

    assert environment.wandb_mode() == mode


def test_variables_are_set_and_put_back(monkeypatch):
    monkeypatch.setenv("ZI_KEPT", "before")
    monkeypatch.delenv("ZI_NEW", raising=False)

    with environment.variables({"ZI_KEPT": "meanwhile", "ZI_NEW": "1"}):
        assert (os.environ["ZI_KEPT"], os.environ["ZI_NEW"]) == ("meanwhile", "1")
        os.environ["ZI_LEFT_BEHIND"] = "1"

    assert os.environ["ZI_KEPT"] == "before"
    assert "ZI_NEW" not in os.environ
    assert "ZI_LEFT_BEHIND" not in os.environ


def test_variables_are_put_back_after_a_failure(monkeypatch):
    monkeypatch.delenv("ZI_NEW", raising=False)

    with pytest.raises(RuntimeError), environment.variables({"ZI_NEW": "1"}):
        raise RuntimeError

    assert "ZI_NEW" not in os.environ


def test_a_process_started_meanwhile_has_the_variables():
    with environment.variables({"ZI_NEW": "seen"}):
        shown = subprocess.run(["printenv", "ZI_NEW"], capture_output=True, text=True)

    assert shown.stdout == "seen\n"


def test_a_worker_without_a_gpu_is_told_so(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)

    assert environment.worker_environment(cuda=False)["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in environment.worker_environment(cuda=True)


def test_a_worker_keeps_what_the_user_has_set(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")

    assert "TOKENIZERS_PARALLELISM" not in environment.worker_environment(cuda=True)


@pytest.mark.parametrize(
    ("visible", "first"), [(None, 0), ("", 0), ("2,3", 2), ("5", 5), ("GPU-8f3a,GPU-77", "GPU-8f3a")]
)
def test_first_visible_gpu(monkeypatch, visible, first):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert environment.first_visible_gpu() == first


def test_a_path_list_may_be_empty(monkeypatch):
    monkeypatch.setenv("CPATH", "/a::/b")
    assert environment.path_list("CPATH") == ["/a", "/b"]

    monkeypatch.delenv("CPATH")
    assert environment.path_list("CPATH") == []


def test_launcher_variables_are_those_that_are_set(monkeypatch):
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "3")

    assert environment.distributed_variables() == {"RANK": "3"}
