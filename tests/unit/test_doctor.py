import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton
from widths import COLUMNS, too_wide

from zi_experiments import doctor

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Seen:
    """The doctor's lines as a user gets them: each check's state, what was found, and how to fix it."""

    def __init__(self, folder: Path, *arguments: str, **variables: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        kept = {name: value for name, value in kept.items() if name not in LAUNCHER}
        home = {"COLUMNS": str(COLUMNS), "LINES": "", "NETRC": str(folder / "netrc"), "PYTHONPATH": ""}
        self.done = subprocess.run(
            [sys.executable, "-m", "zi_experiments.doctor", *arguments],
            cwd=folder,
            env=kept | home | variables,
            capture_output=True,
            text=True,
        )
        assert too_wide(self.done.stdout) == []
        self.rows = {}
        for line in self.done.stdout.splitlines():
            state, name, text = (line[start:end].strip() for start, end in ((0, 10), (10, 30), (30, None)))
            if state:
                self.rows[name] = found = [state, text, ""]
            elif found[2] or text.startswith("→ "):
                found[2] = f"{found[2]} {text.removeprefix('→ ')}".strip()
            else:
                found[1] = f"{found[1]} {text}".strip()


def test_this_machine_has_what_runs_with_default_settings_need(tmp_path):
    seen = Seen(tmp_path)

    assert seen.done.returncode == 0, seen.done.stdout + seen.done.stderr
    assert seen.done.stderr == ""
    assert {state for state, _, _ in seen.rows.values()} <= {"ok", "optional"}
    for name in ("Python", "torch", "deepspeed", "C++ compiler", "Python.h", "ninja", "caches", "output folder"):
        assert seen.rows[name][0] == "ok"
    assert seen.rows["W&B"] == [
        "optional",
        "offline",
        "for runs to be seen online: wandb login, or set WANDB_API_KEY",
    ]
    assert all(fix for state, _, fix in seen.rows.values() if state == "optional")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A machine on which much is wrong."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "file").touch()
    (folder / "libaio.h").write_text("#error broken for a test\n")
    (folder / "deepspeed.py").write_text("raise ImportError('broken for a test')\n")
    old = folder / "transformers-4.40.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.40.0\n")
    variables = {
        "PYTHONPATH": str(folder),
        "PATH": str(folder / "no-programs"),
        "CPATH": str(folder),
        "HOME": str(folder / "file"),
        "TORCH_CUDA_ARCH_LIST": "9.0a",
        "RANK": "0",
        "WANDB_API_KEY": "0" * 40,
    }
    unset = {name: "" for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "CC", "CXX") if name in os.environ}
    return Seen(folder, "--path", "/proc", **variables, **unset)


def test_what_default_runs_lack_is_the_exit_code(broken):
    assert broken.done.returncode == 1
    assert broken.done.stderr == ""


@pytest.mark.parametrize(
    ("name", "state", "found", "fix"),
    [
        ("torch", "ok", "", ""),
        ("transformers", "missing", "4.40.0", "pip install 'transformers>="),
        ("deepspeed", "missing", "cannot be imported (ImportError: broken for a test)", "pip install"),
        ("C++ compiler", "missing", "c++ is not in PATH", "apt-get install g++"),
        ("C compiler", "optional", "gcc or clang is not in PATH", "engine=stream"),
        ("ninja", "ok", str(Path(sys.executable).parent), ""),
        ("libaio", "optional", "is not in PATH", "libaio-dev"),
        ("offload folder", "optional", "cannot be written", "offload.path=/a/writable/folder"),
        ("output folder", "ok", "", ""),
        ("caches", "ok", "there is no home: caches are in ", ""),
        ("launcher", "optional", "only RANK of", "for get_ds_model: set all of them"),
        ("W&B", "ok", "online", ""),
    ],
)
def test_each_thing_that_is_wrong_has_its_row(broken, name, state, found, fix):
    row = broken.rows[name]

    assert row[0] == state
    assert found in row[1]
    assert fix in row[2]
    assert bool(row[2]) is (state != "ok")


def test_architectures_matter_for_a_gpu(broken):
    state, found, fix = broken.rows["CUDA architectures"]

    assert state == ("missing" if "GPU memory" in broken.rows else "optional")
    assert "TORCH_CUDA_ARCH_LIST=9.0a" in found
    assert "unset TORCH_CUDA_ARCH_LIST" in fix


def test_nothing_that_is_missing_breaks_the_doctor(tmp_path):
    for package in ("torch", "transformers", "deepspeed", "hydra", "omegaconf", "psutil", "pynvml", "wandb"):
        (tmp_path / f"{package}.py").write_text(f"raise ImportError('no {package}')\n")

    seen = Seen(tmp_path, PYTHONPATH=str(tmp_path))

    assert seen.done.returncode == 1
    assert seen.done.stderr == ""
    assert "ImportError: no torch" in seen.rows["torch"][1]
    assert "ImportError: no deepspeed" in seen.rows["deepspeed"][1]
    assert "ImportError: no torch" in seen.rows["GPU"][1]
    assert seen.rows["C++ compiler"][0] == "ok"


def test_a_folder_that_is_not_there_gets_one_line(tmp_path):
    done = Seen(tmp_path, "--path", str(tmp_path / "nowhere")).done

    assert done.returncode == 1
    assert " ".join(done.stderr.split()) == (
        f"refused: --path {tmp_path}/nowhere is no folder: mkdir -p {tmp_path}/nowhere, or pass --path /another/folder"
    )


def test_builds_under_way_and_interrupted_ones_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert doctor.builds().found == "none under way"
    for name in ("async_io", "quantizer"):
        (tmp_path / name).mkdir()
    baton = FileBaton(str(tmp_path / "async_io" / "lock"))
    assert baton.try_acquire()
    (tmp_path / "quantizer" / "lock").touch()

    told = doctor.builds()

    baton.release()
    assert told.found == (
        f"async_io: process {os.getpid()} builds it; quantizer: the lock of an interrupted build, which a run removes"
    )


def test_every_package_of_the_project_is_looked_at():
    assert {"torch", "deepspeed", "hydra-core", "wandb"} <= set(doctor._requirements())
    assert "pytest" not in doctor._requirements()
