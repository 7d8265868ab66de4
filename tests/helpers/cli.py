"""The command line as a user has it, in a process of its own, with a tiny model added by --config-dir.

Most commands, and the scripts among these helpers, are forked from a server that has imported torch, transformers and
DeepSpeed, since that takes longer than the commands themselves: processes with signals, limits, variables and output of
their own all the same. `execute` takes the true command line.
"""

import atexit
import gc
import json
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO

import psutil

# what commands import, by and by
IMPORTED = [
    "zi_experiments.cli",
    "zi_experiments.run",
    "zi_experiments.execution.worker",
    "zi_experiments.engines.hf_session",
    "zi_experiments.engines.stream",
    "torch.distributed.launcher.api",
    "transformers.models.opt.modeling_opt",
    "transformers.models.llama.modeling_llama",
    "deepspeed",
]

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

    def arguments(self, *arguments: str) -> list[str]:
        flags = [a for a in arguments if a.startswith("-")]
        overrides = ["model=tiny", "workload=smoke", *(a for a in arguments if not a.startswith("-"))]
        return ["--config-dir", str(self.folder / "choices"), *flags, *overrides]

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        return kept | {"NETRC": str(self.folder / "netrc"), "DS_ACCELERATOR": "cpu"} | variables

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "zi_experiments", *self.arguments(*arguments)]

    def run(self, *arguments: str, data_bytes: int | None = None, **variables: str) -> subprocess.CompletedProcess:
        """Run a forked command, which may have so much memory of its own (`ulimit -d`)."""
        words = ["-m", "zi_experiments", *self.arguments(*arguments)]
        return run(words, self.folder, self.environment(**variables), data_bytes)

    def execute(self, *arguments: str, preexec_fn=None, **variables: str) -> subprocess.CompletedProcess:
        """Run the true command line."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            preexec_fn=preexec_fn,
        )

    def start(
        self, *arguments: str, start_new_session=False, enter: Callable[[], None] | None = None, **variables: str
    ) -> "Forked":
        """A command under way, whose stderr is its stdout; `enter` is called in its process before."""
        words = ["-m", "zi_experiments", *self.arguments(*arguments)]
        return start(words, self.folder, self.environment(**variables), start_new_session, enter)

    def start_executed(
        self, *arguments: str, preexec_fn=None, start_new_session=False, **variables: str
    ) -> subprocess.Popen:
        """The same by the true command line."""
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


def run(
    words: list[str], folder: Path, environment: dict[str, str], data_bytes: int | None = None
) -> subprocess.CompletedProcess:
    """What follows `python` on a command line, forked, and what it has written once it has ended."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        code = Forked(words, folder, environment, out.fileno(), err.fileno(), data_bytes=data_bytes).wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(["python", *words], code, *texts)


def start(
    words: list[str],
    folder: Path,
    environment: dict[str, str],
    start_new_session: bool = False,
    enter: Callable[[], None] | None = None,
) -> "Forked":
    """The same under way, whose stderr is its stdout."""
    reader, writer = os.pipe()
    forked = Forked(words, folder, environment, writer, writer, start_new_session, enter=enter)
    os.close(writer)
    forked.stdout = os.fdopen(reader, encoding="utf-8")
    return forked


def run_script(name: str, *arguments: object) -> list:
    """What a script of this folder writes: the values of its lines in JSON."""
    script = Path(__file__).with_name(name)
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = run([str(script), *map(str, arguments)], script.parent, environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("{", '["'))]


class Forked:
    """A process that is forked; what a test asks of a `subprocess.Popen`."""

    stdout: IO[str] | None = None

    def __init__(
        self,
        words: list[str],
        folder: Path,
        environment: dict[str, str],
        out: int,
        err: int,
        start_new_session: bool = False,
        data_bytes: int | None = None,
        enter: Callable[[], None] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        streams = _Streams(out, err)
        self._process = context.Process(
            target=_enter, args=(words, str(folder), environment, streams, start_new_session, data_bytes, enter)
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("zi_experiments", timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """The rest of its output, read while it is written."""
        assert self.stdout is not None
        rest: list[str] = []
        reader = threading.Thread(target=lambda: rest.append(self.stdout.read()), daemon=True)
        reader.start()
        self.wait(timeout)
        reader.join(timeout)
        return "".join(rest), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Streams:
    """Two file descriptors that go to another process."""

    def __init__(self, *descriptors: int) -> None:
        self._descriptors = descriptors

    def __getstate__(self) -> list:
        return [DupFd(each) for each in self._descriptors]

    def __setstate__(self, state: list) -> None:
        self._descriptors = [each.detach() for each in state]

    def take_the_place_of_mine(self) -> None:
        for number, descriptor in zip((1, 2), self._descriptors, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        # as Python makes them where nobody watches
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)


def _enter(
    words: list[str],
    folder: str,
    environment: dict[str, str],
    streams: _Streams,
    start_new_session: bool,
    data_bytes: int | None,
    enter: Callable[[], None] | None,
) -> None:
    """Be `python WORDS`, from its start to the end of the process."""
    if enter is not None:
        enter()
    if start_new_session:
        os.setsid()
    if data_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes, data_bytes))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    streams.take_the_place_of_mine()
    gc.freeze()
    code = 1
    try:
        _execute(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _execute(words: list[str]) -> None:
    if words[0] == "-m":
        sys.argv = ["-m", *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def wait_for(process: subprocess.Popen | Forked, text: str) -> None:
    """Read a process's output until a line contains the text."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} never came:\n{''.join(lines)}")


def workers(process: subprocess.Popen | Forked) -> list[psutil.Process]:
    """The worker processes under a launcher, by the name that each gives itself."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if _name(child).startswith("zi-worker")]


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""  # it has just ended
