import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zi_experiments import provenance


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

    assert provenance.command() == expected


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def copy(tmp_path):
    """The module under test, in a folder of its own."""
    file = tmp_path / "package" / "provenance.py"
    file.parent.mkdir()
    shutil.copy(provenance.__file__, file)
    spec = importlib.util.spec_from_file_location("copied_provenance", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(copy):
    folder = Path(copy.__file__).parent
    git(folder, "init", "--quiet")
    git(folder, "add", "provenance.py")
    git(folder, "commit", "--quiet", "-m", "one")
    return folder


def test_the_revision_is_the_commit(copy, checkout):
    assert copy.git_revision() == git(checkout, "rev-parse", "HEAD")


def test_a_changed_checkout_is_dirty(copy, checkout):
    head = git(checkout, "rev-parse", "HEAD")
    with (checkout / "provenance.py").open("a") as file:
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


@pytest.mark.parametrize("name", ["module.py", "kernel.c"])
def test_the_code_of_a_record_is_another_when_a_source_changes(copy, name):
    source = Path(copy.__file__).with_name(name)
    source.write_text("one\n")
    before = copy.code()["code"]
    source.write_text("two\n")

    assert copy.code()["code"] != before


def test_description_of_this_machine(machine):
    described = provenance.describe(machine("h200"))

    assert described["packages"]["torch"]
    assert described["packages"]["hydra-core"].startswith("1.3")
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    assert described["cpu"]
    assert 0 < described["cpu_cores"] <= os.cpu_count()
    assert described["host_memory_bytes"] > 1 << 28
    assert (described["device"], described["gpu"]) == ("cuda", "NVIDIA H200")
