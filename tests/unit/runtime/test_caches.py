"""Who has no home to write to has caches elsewhere."""

import os
import shutil
import stat

import pytest
from cli import Cli

from zi_experiments import environment
from zi_experiments.config.schema import ConfigError
from zi_experiments.runtime import caches

NOBODY = 12345  # a user whom this machine does not know


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A user's variables, put back at the end, and a folder for temporary files."""
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "TRITON_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with environment.variables({}):
        yield folder


def test_a_home_that_can_be_written_is_left_alone(temporary, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    assert caches.settle() is None
    assert list(tmp_path.iterdir()) == [temporary]


@pytest.mark.parametrize("home", ["/nonexistent/zi", "/proc"])
def test_a_home_that_cannot_be_written(temporary, monkeypatch, home):
    """It is not made either, if it is not there."""
    monkeypatch.setenv("HOME", home)

    line = caches.settle()

    (folder,) = temporary.iterdir()
    assert f"caches are in {folder}" in line
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert environment.cache_folder() == folder / "zi_experiments"
    assert {os.environ[name] for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "TRITON_HOME")} == {str(folder)}
    assert os.environ["HOME"] == (str(folder) if home.startswith("/nonexistent") else home)
    assert not os.path.exists("/nonexistent")
    assert caches.settle() is None, "it is said once"


def test_what_the_hub_has_downloaded_to_a_home_that_can_only_be_read_is_read(temporary, tmp_path, monkeypatch):
    hub = tmp_path / ".cache" / "huggingface"
    hub.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/caches")

    assert caches.settle().startswith("/proc/caches cannot be written: ")
    assert os.environ["HF_HOME"] == str(hub)
    assert "TRITON_HOME" not in os.environ


@pytest.mark.parametrize("kind", ["a link", "open to all", "a file"])
def test_a_folder_that_is_not_this_user_s_alone_is_refused(temporary, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HOME", "/proc")
    folder = temporary / f"zi-caches-{os.getuid()}"
    if kind == "a link":
        folder.symlink_to(tmp_path)
    elif kind == "a file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777)

    with pytest.raises(ConfigError, match=f"{folder} .*: set HOME to a folder of yours"):
        caches.settle()


@pytest.mark.integration
def test_a_user_whom_nobody_knows(tmp_path):
    """As with `docker run --user 12345`: no entry in passwd, no HOME. It reads everything, since Python may be root's."""
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root becomes another user")
    cli = Cli(tmp_path)
    for folder in (tmp_path, tmp_path / "disk"):
        folder.chmod(0o777)
    user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    may = [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient")]
    cli.command = lambda *arguments: ["setpriv", *user, *may, "env", "-u", "HOME", *Cli.command(cli, *arguments)]

    own = tmp_path / "disk" / f"zi-caches-{NOBODY}"
    measured = environment.cache_folder() / "hardware"  # once is enough for this machine
    if measured.is_dir():
        shutil.copytree(measured, own / "zi_experiments" / "hardware")
        own.chmod(0o700)
        for path in (own, *own.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    done = cli.execute("engine=stream", "quant=fp16", "verify=off", TMPDIR=str(own.parent))

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("caches are in ") == 1
    assert own.stat().st_uid == NOBODY
    (result,) = cli.results()
    assert result["status"] == "ok"
