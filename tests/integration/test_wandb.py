"""Weights & Biases as its user has set it up: variables, logins, and servers that do not answer."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import wandb
import wandb_file
from cli import Cli

from zi_experiments.config.composition import to_run
from zi_experiments.config.schema import ConfigError, TrackingMode

KEY = "0" * 40
HERE = wandb.Settings().base_url.partition("://")[2]  # the host of who has set nothing up


@pytest.fixture
def variables(monkeypatch):
    """`variables(NAME=value, …)` sets those of W&B, and no others."""

    def variables(**values):
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return variables


# --- variables --------------------------------------------------------------------------------------------------------


def test_variables_win_over_defaults(compose, variables):
    variables(WANDB_PROJECT="p", WANDB_ENTITY="e", WANDB_RUN_GROUP="g", WANDB_TAGS="a, b", WANDB_NAME="n")
    run = to_run(compose())

    tracking = run.tracking
    assert (tracking.project, tracking.entity, tracking.group, tracking.tags) == ("p", "e", "g", ["a", "b"])
    assert (run.name, tracking.mode) == ("n", TrackingMode.auto)


def test_variables_do_not_win_over_what_was_typed(compose, variables):
    variables(WANDB_PROJECT="p", WANDB_RUN_GROUP="g", WANDB_TAGS="a", WANDB_NAME="n", WANDB_MODE="online")
    typed = ["tracking.project=q", "tracking.group=h", "tracking.tags=[c]", "name=m", "tracking.mode=offline"]
    run = to_run(compose(*typed))

    tracking = run.tracking
    assert (tracking.project, tracking.group, tracking.tags, run.name) == ("q", "h", ["c"], "m")
    assert tracking.mode is TrackingMode.offline


def test_blank_variables_say_nothing(compose, variables):
    variables(WANDB_PROJECT="", WANDB_TAGS=" ", WANDB_NAME="", WANDB_MODE="", WANDB_RUN_GROUP="")
    blank = to_run(compose())

    variables()
    assert blank == to_run(compose())


def test_a_mode_is_taken_in_capitals_and_refused_when_it_is_none(compose, variables):
    variables(WANDB_MODE="DISABLED")
    assert to_run(compose()).tracking.mode is TrackingMode.disabled

    variables(WANDB_MODE="foo")
    with pytest.raises(ConfigError, match=r"^tracking.mode: .*'foo'.*offline.*: pass tracking.mode="):
        to_run(compose())


# --- logins -----------------------------------------------------------------------------------------------------------


def found(home, **variables):
    """What a process of its own takes `tracking.mode=auto` for."""
    code = (
        "from zi_experiments import environment; environment.prepare_for_wandb('auto');"
        "from zi_experiments.results.sinks import wandb; print(wandb.login_mode())"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") and name != "NETRC"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"HOME": str(home)} | variables,
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "wandb:" not in done.stderr
    return done.stdout.strip()


def write_netrc(path, host=HERE):
    path.write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    path.chmod(0o600)
    return str(path)


def write_settings(home, text):
    folder = home / ".config" / "wandb"
    folder.mkdir(parents=True)
    (folder / "settings").write_text(f"[default]\n{text}\n")


def test_nobody_logged_in_is_offline(tmp_path):
    assert found(tmp_path) == "offline"


def test_a_key_is_a_login(tmp_path):
    assert found(tmp_path, WANDB_API_KEY=KEY, WANDB_MODE="") == "online"


def test_a_netrc_at_home_is_a_login_to_its_host(tmp_path):
    write_netrc(tmp_path / ".netrc")

    assert found(tmp_path) == "online"
    assert found(tmp_path, WANDB_BASE_URL="https://wandb.example.org") == "offline"


def test_a_netrc_elsewhere_and_a_server_of_one_s_own(tmp_path):
    netrc = write_netrc(tmp_path / "elsewhere", "wandb.example.org:8443")

    assert found(tmp_path, NETRC=netrc, WANDB_BASE_URL="https://wandb.example.org:8443") == "online"
    assert found(tmp_path, NETRC=netrc) == "offline"


def test_what_wandb_has_settled_counts(tmp_path):
    write_settings(tmp_path, "mode = offline")

    assert found(tmp_path, WANDB_API_KEY=KEY) == "offline"


# --- servers ----------------------------------------------------------------------------------------------------------


class Mortal(BaseHTTPRequestHandler):
    """A server that takes one run, and answers nothing after that."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if b"UpsertBucket" not in body or self.server.is_dead.is_set():
            self.server.is_over.wait()
            return
        self.server.is_dead.set()
        name = json.loads(body)["variables"]["name"]
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        bucket = {"id": "b", "name": name, "displayName": "x", "project": project}
        answer = json.dumps({"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Mortal) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.is_dead, server.is_over = threading.Event(), threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.is_over.set()
        server.shutdown()


def test_a_server_that_dies_costs_nothing_but_a_line(tmp_path, server):
    cli = Cli(tmp_path)
    patience = {"WANDB_HTTP_TIMEOUT": "2", "WANDB_FINISH_TIMEOUT": "2"}
    url = f"http://127.0.0.1:{server.server_port}"
    done = cli.run(
        "engine=stream", "verify=off", "tracking.mode=online", WANDB_API_KEY=KEY, WANDB_BASE_URL=url, **patience
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert server.is_dead.is_set()
    (result,) = cli.results()
    assert result["status"] == "ok"
    assert "W&B: its server no longer answers, and the figures are on disk; wandb sync outputs/" in done.stdout
    assert "failed and is skipped" not in done.stderr
    run = wandb_file.read(result["folder"], "run")
    assert run["exit_code"] == 0
    assert run["summary"]["decode_tok_per_s"] == result["metrics"]["decode_tok_per_s"]
