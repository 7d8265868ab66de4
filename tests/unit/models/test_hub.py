"""A hub on this machine, which answers and then no longer does; in a process of its own, since tests are offline otherwise."""

import json
import os
import subprocess
import sys

import pytest
from families import save_checkpoint

CONFIG = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 128}
CHILD = """
import json, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        commit = ("1" if "/resolve/v2/" in self.path else "0") * 40
        self.send_response(200)
        for name, value in {"ETag": f'"{commit}"', "X-Repo-Commit": commit, "Content-Length": str(len(CONFIG))}.items():
            self.send_header(name, value)
        self.end_headers()
    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(CONFIG.replace(b": 3", b": 5") if "/resolve/v2/" in self.path else CONFIG)
    def log_message(self, *arguments):
        pass

CONFIG = sys.argv[1].encode()
server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
import os
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
from zi_experiments.models import description
from zi_experiments.config.composition import from_choices
from zi_experiments.config.schema import ConfigError

def layers(name, revision=None):
    run = from_choices({"model": "local"}, {"model.path": name, "model.revision": revision, "model.name": "x", "name": "x"})
    found = description.load(run)
    return found.num_layers, found.config._commit_hash[:1]

print(layers("some/model"))
print(layers("some/model", "v2"))
server.shutdown()
server.server_close()
print(layers("some/model"))
try:
    print(layers("another/model", "v2"))
except ConfigError as error:
    print(error)
print(os.environ.get("HF_HUB_OFFLINE"))
"""


@pytest.mark.integration
def test_a_hub_that_answers_is_asked_and_one_that_does_not_is_left_alone(tmp_path):
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(CONFIG)],
        env=kept | {"HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert not done.returncode, done.stderr
    there, of_v2, cached, refused, offline = done.stdout.splitlines()
    assert (there, of_v2, cached) == ("(3, '0')", "(5, '1')", "(3, '0')")
    assert refused.startswith(
        "another/model@v2 is neither a Hugging Face model folder nor a hub name that can be read here"
    )
    assert offline == "1", "workers would ask again"
    assert "Retry" not in done.stderr


DOWNLOADING = """
import sys, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

class Hub(SimpleHTTPRequestHandler):
    def send_head(self):
        self.path = "/" + self.path.partition("?")[0].rsplit("/", 1)[-1]
        return super().send_head()
    def end_headers(self):
        for name, value in {"ETag": f'"{self.path}"', "X-Repo-Commit": "0" * 40}.items():
            self.send_header(name, value)
        super().end_headers()
    def send_error(self, code, *rest):
        self.send_response(code)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *arguments):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=sys.argv[1]))
threading.Thread(target=server.serve_forever, daemon=True).start()
import os
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
import torch
from transformers import AutoModelForCausalLM
from zi_experiments.models import description, hub
from zi_experiments.models.weights import PretrainedWeights
from zi_experiments.config.composition import from_choices
from zi_experiments.config.schema import ConfigError

run = from_choices({"model": "local"}, {"model.path": "some/model", "model.name": "x", "name": "x"})
found = description.load(run)
weights = PretrainedWeights("some/model", found.config, torch.bfloat16)
plain = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
for name, parameter in plain.named_parameters():
    value = torch.empty_like(parameter)
    weights.fill(name, value.data)
    assert torch.equal(value, parameter), name
print("equal")
server.shutdown()
server.server_close()
hub.settle()  # as the launcher does
try:
    PretrainedWeights("another/model", found.config, torch.bfloat16)
except ConfigError as error:
    print(error)
"""


@pytest.mark.integration
def test_a_worker_downloads_what_the_index_names(tmp_path):
    save_checkpoint(tmp_path / "hub", "llama", layout="sharded")
    assert (tmp_path / "hub" / "model.safetensors.index.json").exists()
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}

    done = subprocess.run(
        [sys.executable, "-c", DOWNLOADING, str(tmp_path / "hub")],
        env=kept | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert not done.returncode, done.stderr
    equal, refused = done.stdout.splitlines()[-2:]
    assert equal == "equal"
    assert refused.startswith("another/model cannot be downloaded from the hub (")
    assert ": pass weights.path=… of a folder, or weights=random" in refused
