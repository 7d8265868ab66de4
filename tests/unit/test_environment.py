import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["/site-packages/zi_experiments/__main__.py", "model=opt-13b", "quant=int4"],
            "python -m zi_experiments model=opt-13b quant=int4",
        ),
        (["/usr/bin/zi-experiments", "-m", "quant=fp16,int4"], "zi-experiments -m quant=fp16,int4"),
        (
            ["/x/__main__.py", "offload.path=/my disk", "tracking.tags=[a,b]", "name='$x'"],
            "python -m zi_experiments 'offload.path=/my disk' 'tracking.tags=[a,b]' 'name='\"'\"'$x'\"'\"''",
        ),
    ],
)
def test_the_command_can_be_typed_again(monkeypatch, argv, expected):
    monkeypatch.setattr(sys, "argv", argv)

    assert environment.command() == expected


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


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def copy(tmp_path):
    """The module under test, in a folder of its own."""
    file = tmp_path / "package" / "environment.py"
    file.parent.mkdir()
    shutil.copy(environment.__file__, file)
    spec = importlib.util.spec_from_file_location("copied_environment", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(copy):
    folder = Path(copy.__file__).parent
    git(folder, "init", "--quiet")
    git(folder, "add", "environment.py")
    git(folder, "commit", "--quiet", "-m", "one")
    return folder


def test_the_revision_is_the_commit(copy, checkout):
    assert copy.git_revision() == git(checkout, "rev-parse", "HEAD")


def test_a_changed_checkout_is_dirty(copy, checkout):
    head = git(checkout, "rev-parse", "HEAD")
    with (checkout / "environment.py").open("a") as file:
        file.write("# changed\n")

    assert copy.git_revision() == f"{head}-dirty"


def test_a_tag_does_not_hide_the_commit(copy, checkout):
    git(checkout, "tag", "-a", "v1", "-m", "v1")

    assert copy.git_revision() == git(checkout, "rev-parse", "HEAD")


def test_outside_a_checkout_there_is_no_revision(copy):
    assert copy.git_revision() is None


def test_installed_inside_another_project_s_checkout_there_is_no_revision(copy):
    """A virtual environment inside a repository: the repository's revision says nothing about this code."""
    folder = Path(copy.__file__).parent
    (folder / "other.txt").write_text("other\n")
    git(folder, "init", "--quiet")
    git(folder, "add", "other.txt")
    git(folder, "commit", "--quiet", "-m", "one")

    assert copy.git_revision() is None


def test_description_of_this_machine(machine):
    described = environment.describe(machine("h200"))

    assert described["packages"]["torch"]
    assert described["packages"]["hydra-core"].startswith("1.3")
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    assert described["cpu"]
    assert 0 < described["cpu_cores"] <= os.cpu_count()
    assert described["host_memory_bytes"] > 1 << 28
    assert (described["device"], described["gpu"]) == ("cuda", "NVIDIA H200")
