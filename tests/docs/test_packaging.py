"""The wheel carries its configuration and runs from anywhere."""

import os
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from places import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--wheel-dir", str(folder)]
    _python(["-m", "pip", "wheel", *options, str(ROOT)], cwd=folder)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def _python(arguments: list[str], cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_every_yaml_file_module_and_text(unpacked: Path) -> None:
    def names(folder: Path, pattern: str) -> set[Path]:
        return {path.relative_to(folder) for path in folder.rglob(pattern)}

    assert names(unpacked / "zi_experiments" / "conf", "*.yaml") == names(ROOT / "conf", "*.yaml")
    assert names(unpacked / "zi_experiments", "*.py") == names(ROOT / "zi_experiments", "*.py")
    for kind in ("data/*", "report/page/*"):
        assert names(unpacked / "zi_experiments", kind) == names(ROOT / "zi_experiments", kind) != set()
    assert {path.name for path in unpacked.iterdir()} == {"zi_experiments", f"zi_experiments-{VERSION}.dist-info"}


def test_wheel_declares_the_console_script(unpacked: Path) -> None:
    entry_points = ConfigParser()
    entry_points.read(unpacked / f"zi_experiments-{VERSION}.dist-info" / "entry_points.txt")
    assert dict(entry_points["console_scripts"]) == {"zi-experiments": "zi_experiments.cli:main"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cfg", "job", "model=opt-30b"], "name: opt-30b"),
        (["--help"], "python -m zi_experiments"),
        (["--info", "searchpath"], "{conf}"),
    ],
)
def test_unpacked_wheel_runs_from_another_folder(
    unpacked: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    shown = _python(["-m", "zi_experiments", *arguments], cwd=tmp_path, PYTHONPATH=str(unpacked))
    assert expected.format(conf=unpacked / "zi_experiments" / "conf") in shown
    assert str(ROOT / "conf") not in shown
