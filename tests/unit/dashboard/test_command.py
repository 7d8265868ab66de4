"""What the command says where it cannot save a view; tests/integration/test_dashboard.py has where it can."""

import os
import subprocess
import sys
import tomllib

import pytest
from places import ROOT


@pytest.fixture
def type_it(tmp_path):
    """`type_it(*arguments, before=code, **variables)` → the finished process of somebody who is not logged in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}

    def type_it(*arguments, before="", **variables):
        code = f"import sys; {before}\nfrom zi_experiments.dashboard.command import main\nsys.exit(main({arguments!r}))"
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=kept | {"NETRC": str(tmp_path / "netrc"), "HOME": str(tmp_path)} | variables,
            capture_output=True,
            text=True,
        )

    return type_it


def test_a_missing_package_is_one_line_that_says_what_to_install(type_it):
    done = type_it(before="sys.modules['wandb_workspaces'] = None")

    assert done.returncode == 1
    (package,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dashboard"]
    name = package.partition(">=")[0]
    assert done.stderr == f"refused: {name} is not installed: pip install {name}\n"


def test_a_mode_without_a_server_is_said(type_it, tmp_path):
    done = type_it("--output", "view.json", WANDB_MODE="offline")

    assert done.returncode == 0
    assert done.stdout == (
        "view.json has the view, since WANDB_MODE is offline: unset WANDB_MODE, and type the same again to save it\n"
    )
    assert (tmp_path / "view.json").is_file()


def test_a_file_that_cannot_be_written_is_refused(type_it):
    done = type_it("--output", "/dev/null/view.json")

    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("refused: /dev/null")
    assert line.endswith("pass --output /another/file")
