"""The command line as a user has it, in a process of its own, with a tiny model added by --config-dir."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

TINY = """
name: tiny
path: null
architecture:
  model_type: opt
  num_hidden_layers: {layers}
  hidden_size: 768
  ffn_dim: 3072
  word_embed_proj_dim: 768
  num_attention_heads: 4
  vocab_size: 512
  max_position_embeddings: 512
"""


class Cli:
    """Runs in `folder`; W&B is never logged in, wherever the tests run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        models = folder / "choices" / "model"
        models.mkdir(parents=True)
        (models / "tiny.yaml").write_text(TINY.format(layers=2))
        (folder / "disk").mkdir(exist_ok=True)  # for offload.path
        (models / "deep.yaml").write_text(TINY.format(layers=24).replace("tiny", "deep"))

    def command(self, *arguments: str) -> list[str]:
        flags = [a for a in arguments if a.startswith("-")]
        overrides = ["model=tiny", "workload=smoke", *(a for a in arguments if not a.startswith("-"))]
        return [
            sys.executable,
            "-m",
            "zi_experiments",
            "--config-dir",
            str(self.folder / "choices"),
            *flags,
            *overrides,
        ]

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        return kept | {"NETRC": str(self.folder / "netrc"), "DS_ACCELERATOR": "cpu"} | variables

    def run(self, *arguments: str, preexec_fn=None, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            preexec_fn=preexec_fn,
        )

    def start(self, *arguments: str, preexec_fn=None, start_new_session=False, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            stdin=subprocess.DEVNULL,
            preexec_fn=preexec_fn,
            start_new_session=start_new_session,
        )

    def results(self) -> list[dict]:
        """Every result.json under the working folder, oldest first, with its folder added as `folder`."""
        paths = sorted(self.folder.glob("outputs/**/result.json"))
        return [json.loads(path.read_text()) | {"folder": path.parent} for path in paths]


def wait_for(process: subprocess.Popen, text: str) -> None:
    """Read a process's output until a line contains the text."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} never came:\n{''.join(lines)}")


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The worker processes under a launcher: those that multiprocessing spawned to do the work."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "spawn_main" in _command(child)]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""  # it has just ended
