"""Faults, caused for real: what a run says, and that nothing stays behind. docs/reliability.md is written from here."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil
import pytest
import torch
import wandb_file
from cli import wait_for, workers
from reliability import Faulty, abandoned_shared_memory, fill, shown
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from zi_experiments import environment

STREAM = ("engine=stream", "quant=fp16")
LONG = (*STREAM, "model=deep", "workload.repeats=500", "verify=off", "tracking=none")
SIX_LAYERS = ("model=deep", "model.architecture.num_hidden_layers=6")
MORE = {"verify": ["verify=on"], "warm-up": ["workload.warmup=500"]}  # that a phase takes some seconds


@pytest.fixture
def cli(tmp_path):
    return Faulty(tmp_path)


@pytest.fixture
def conclude(page, cli):
    """`conclude(fault, output, left)`: the record says why, the console says the same, and the page has the line."""

    def conclude(fault, output, left):
        result = cli.result()
        message = result["error"]["message"]
        assert result["metrics"] is None
        assert result["run"]["finished_at"] is not None
        assert "\n" not in message
        assert message in output
        page.check(fault, f"`{result['status']}`", f"`{shown(message, cli.folder)}`", left)
        return result

    return conclude


def end(process, timeout_s=120):
    """The rest of a process's output, once it has ended by itself."""
    return process.communicate(timeout=timeout_s)[0]


def worker_of(process):
    deadline = time.monotonic() + 300
    while not (found := workers(process)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found[0]


def test_shared_memory_is_abandoned_when_no_process_has_it():
    before = abandoned_shared_memory()
    event = multiprocessing.get_context("spawn").Event()
    assert abandoned_shared_memory() <= before
    named = SharedMemory(create=True, size=1)
    named.close()
    assert abandoned_shared_memory() - before >= {named.name.removeprefix("/")}
    named.unlink()
    assert not event.is_set()


# --- kill -9 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["start", "load", "verify", "warm-up", "measure"])
def test_a_worker_is_killed(cli, conclude, phase):
    process = cli.start(*LONG, "offload=nvme", *MORE.get(phase, []))
    if phase != "start":
        wait_for(process, f"{phase}:")
    worker_of(process).kill()
    output = end(process)

    assert process.returncode == 1
    result = conclude(f"`kill -9` of a worker: {phase}", output, left=cli.left())
    assert result["status"] == "killed"
    assert "SIGKILL" in result["error"]["message"]


def test_the_launcher_is_killed(cli, page, tmp_path_factory):
    """What it leaves in its own folder, another run finds, which writes elsewhere."""
    own = tmp_path_factory.mktemp("cache")  # runs of other tests would find it too
    (own / "zi_experiments").mkdir()
    (own / "zi_experiments" / "hardware").symlink_to(environment.cache_folder() / "hardware")
    cache = {"XDG_CACHE_HOME": str(own)}
    process = cli.start_executed("model=deep", *STREAM, "offload=nvme", "workload.repeats=5000", **cache)
    wait_for(process, "measure:")
    (written,) = cli.folder.glob("outputs/**/*.wandb")
    wait_until(lambda: written.stat().st_size > 1000)  # W&B writes every 15 s
    wait_until(lambda: not list(cli.temporary.glob("wandb-symon-portfile-*")))  # its monitor has started
    process.kill()
    end(process)

    result = cli.result()
    assert re.fullmatch("temporary zi-[0-9a-f]{12}, weights", cli.left())
    assert result["status"] == "killed"
    assert result["run"]["finished_at"] is None
    assert wandb_file.read(result["folder"])["config"]["choices"]["model"] == "deep"
    page.check(
        "`kill -9` of the launcher, or a machine that goes down",
        "`killed`",
        f"nothing; the record reads `{result['error']['message']}`, and what W&B has written can be read",
        "weights on disk and temporary files, which the next run removes",
    )

    done = cli.run(*STREAM, "tracking=none", **cache)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = result["folder"].relative_to(cli.folder)
    assert f"removed {folder}/offload/zi-{result['run']['id']}: the run that made it was killed" in done.stdout
    assert not [path for path in (own / "zi_experiments" / "scratch").rglob("*") if path.is_symlink()]
    assert cli.left() == "nothing"


# --- signals to the launcher ------------------------------------------------------------------------------------------


STOPS = {
    "plan": signal.SIGINT,
    "start": signal.SIGTERM,
    "load": signal.SIGHUP,
    "verify": signal.SIGUSR1,
    "warm-up": signal.SIGUSR2,
    "measure": signal.SIGINT,
}


@pytest.mark.parametrize("phase", STOPS)
def test_a_run_is_stopped(cli, conclude, page, phase):
    """By all signals that end a run, at all times; a terminal sends Ctrl-C to all processes at once."""
    start = cli.start_executed if phase == "plan" else cli.start  # what is forked has imported everything by then
    process = start(*LONG, "offload=nvme", *MORE.get(phase, []), start_new_session=True)
    if phase == "plan":
        wait_until(lambda: any("libtorch" in mapped.path for mapped in psutil.Process(process.pid).memory_maps()))
    elif phase == "start":
        worker_of(process)
    else:
        wait_for(process, f"{phase}:")
    number = STOPS[phase]
    began = time.monotonic()
    os.killpg(process.pid, number)
    os.killpg(process.pid, number)  # impatience changes nothing
    output = end(process)

    assert time.monotonic() - began < 5
    # a shell calls both 130: Python ends itself by SIGINT when the interrupt came in the middle of an exec()
    assert process.returncode in (130, -signal.SIGINT)
    name = {"SIGINT": "Ctrl-C", "SIGHUP": "SIGHUP: a terminal that is closed"}.get(number.name, number.name)
    result = conclude(f"{name} ({phase}), to all processes, twice", output, left=cli.left())
    assert result["status"] == "killed"
    assert result["error"]["message"] == f"stopped by {number.name}"


def test_a_stopped_run_closes_wandb(cli, conclude):
    process = cli.start(*LONG[:-1])
    wait_for(process, "measure:")
    began = time.monotonic()
    process.terminate()
    output = end(process)

    assert time.monotonic() - began < 10  # about 3 on a machine that does nothing else
    result = conclude("SIGTERM to the launcher alone, with W&B", output, left=cli.left())
    run = wandb_file.read(result["folder"])
    assert run["summary"]["status"] == "killed"
    assert run["exit_code"] == 1


def test_a_run_is_stopped_while_wandb_waits_for_its_server(cli, conclude):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        server = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = cli.start(*STREAM, "tracking.mode=online", WANDB_API_KEY="0" * 40, WANDB_BASE_URL=server)
        silent.settimeout(30)
        connection, _ = silent.accept()
        began = time.monotonic()
        process.terminate()
        output = end(process)
        connection.close()

    assert time.monotonic() - began < 10  # about 3 on a machine that does nothing else
    conclude("SIGTERM while W&B waits for a server that does not answer", output, left=cli.left())


def test_nohup_is_respected(cli):
    def ignoring():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = cli.start_executed(*STREAM, "tracking=none", preexec_fn=ignoring)
    wait_for(process, "load:")
    process.send_signal(signal.SIGHUP)
    output = end(process)

    assert process.returncode == 0, output
    assert cli.result()["status"] == "ok"


def wait_until(true, timeout_s=180):
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- hangs and aborts -------------------------------------------------------------------------------------------------


def test_a_worker_hangs(cli, conclude):
    """One rank stands still, so the other waits for it: where, is in the record."""
    settings = (*SIX_LAYERS, "quant=fp16", "workload.repeats=1000", "hardware.num_gpus=2", "launch.timeout_s=15")
    process = cli.start(*settings, "tracking=none")
    wait_for(process, "measure:")
    wait_until(lambda: len(workers(process)) == 2)
    max(workers(process), key=lambda worker: worker.pid).suspend()
    output = end(process)

    assert process.returncode == 1
    result = conclude("a hang: one of two ranks stands still", output, left=cli.left())
    assert result["status"] == "killed"
    assert result["error"]["type"] == "Timeout"
    assert "measure_pass" in result["error"]["traceback"]
    assert "cli.py" not in result["error"]["traceback"], "where the worker was forked does not matter"


WATCH = """
import threading, time
from concurrent.futures import Future
from types import SimpleNamespace
from zi_experiments.execution import launcher

running, silent = Future(), SimpleNamespace(heard_at=time.monotonic())
print("watching", flush=True)
threading.Timer(1.0, running.set_result, [None]).start()
print(launcher._watch(running, silent, 3.0))
"""


def test_a_process_that_was_stopped_and_continued_does_not_hang():
    process = subprocess.Popen([sys.executable, "-c", WATCH], stdout=subprocess.PIPE, text=True)
    wait_for(process, "watching")
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)

    assert end(process) == "False\n"


def test_a_cpp_operator_aborts(cli, conclude):
    """DeepSpeed's asynchronous I/O ends the process when a file is shorter than what it should read."""
    process = cli.start(*SIX_LAYERS, "quant=fp16", "offload=nvme", "workload.repeats=1000", "tracking=none")
    wait_for(process, "measure:")
    for path in list(cli.folder.rglob("*.swp")):
        with suppress(FileNotFoundError):  # once the first has done it, the run removes the others
            os.truncate(path, 0)
    output = end(process)

    assert process.returncode == 1
    result = conclude("an abort in a C++ operator: weights on disk are cut off", output, left=cli.left())
    assert result["status"] == "error"


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_limit_on_memory(cli, conclude):
    done = cli.run("model=opt-1.3b", "quant=fp16", "tracking=none", data_bytes=2 << 30)

    assert done.returncode == 1
    result = conclude("a limit on memory (`ulimit -d`)", done.stdout, left=cli.left())
    assert result["status"] == "oom"
    assert "quant=int4" in result["error"]["hint"]
    assert "allocate" in result["error"]["traceback"]


@pytest.fixture
def memory_cgroup():
    """A control group of 1.5 GB: `cgroup.procs` to write to."""
    for base, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(base) / f"zi-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text("1500000000")
        except OSError:
            group.rmdir()
            continue
        yield group / "cgroup.procs"
        wait_until(lambda group=group: not (group / "cgroup.procs").read_text())
        group.rmdir()
        return
    pytest.skip("no control groups may be made here")


def test_the_kernel_kills_a_worker_for_memory(cli, conclude, memory_cgroup):
    def join():
        memory_cgroup.write_text(str(os.getpid()))

    # the plan is told of more than there is
    done = cli.execute("model=opt-1.3b", *STREAM, "tracking=none", "hardware.host_memory_gib=8", preexec_fn=join)

    assert done.returncode == 1, done.stdout + done.stderr
    result = conclude("out of memory: the kernel kills a worker", done.stdout, left=cli.left())
    assert result["status"] == "oom"
    assert "hardware.host_memory_gib" in result["error"]["hint"]


# --- disks ------------------------------------------------------------------------------------------------------------


def test_the_disk_is_full_when_the_result_is_written(cli, page, small_disk):
    folder = small_disk / "run"
    process = cli.start(*STREAM, "tracking=none", "workload.repeats=100", f"hydra.run.dir={folder}")
    wait_for(process, "measure:")
    fill(small_disk)
    output = end(process)

    assert process.returncode == 1
    said, text = output[output.index("{") :], output.splitlines()
    result = json.loads(said)
    assert result["status"] == "ok"
    assert result["metrics"]["decode_tok_per_s"] > 0
    line = next(line for line in text if "the record follows" in line)
    assert not list(folder.glob(".result*"))
    page.check(
        "the disk is full when the result is written",
        "`ok`, exit code 1",
        f"`{shown(line, small_disk)}`",
        cli.left(),
    )


def test_the_output_folder_cannot_be_written(cli, page):
    (cli.folder / "file").write_text("")

    done = cli.run(*STREAM, "tracking=none", "hydra.run.dir=file/run")

    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    line = (done.stdout + done.stderr).strip()
    page.check("the output folder cannot be made", "none", f"`{shown(line, cli.folder)}`", cli.left())


def test_the_offload_path_is_not_there(cli, conclude):
    """It is the mount of a disk, perhaps, and a folder in its place would be on another."""
    done = cli.run(*STREAM, "tracking=none", "offload=nvme", "offload.path=disc")

    assert done.returncode == 1
    assert conclude("`offload.path` is not there", done.stdout, left=cli.left())["status"] == "refused"
    assert not (cli.folder / "disc").exists()


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100KB")
    return folder


def damaged(cli, conclude, checkpoint, fault):
    done = cli.run(*STREAM, "tracking=none", "model=local", f"model.path={checkpoint}", "weights=pretrained")

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return conclude(fault, done.stdout, left=cli.left())


def test_a_shard_is_truncated(cli, conclude, checkpoint):
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1000)

    assert damaged(cli, conclude, checkpoint, "a shard of a checkpoint is truncated")["status"] == "refused"


def test_a_safetensors_file_is_corrupted(cli, conclude, checkpoint):
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    with shard.open("r+b") as file:
        file.write(b"\xff" * 8)

    assert damaged(cli, conclude, checkpoint, "a safetensors file is corrupted")["status"] == "refused"


def test_a_shard_is_missing(cli, conclude, checkpoint):
    sorted(checkpoint.glob("*.safetensors"))[0].unlink()

    assert damaged(cli, conclude, checkpoint, "a shard of a checkpoint is missing")["status"] == "refused"


def test_a_weight_is_missing(cli, conclude, checkpoint):
    """Known once the names of the files have been matched with those of the model: before anything is loaded."""
    for shard in checkpoint.glob("*.safetensors"):
        tensors = load_file(shard)
        kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}
        save_file(kept, shard, metadata={"format": "pt"})

    assert damaged(cli, conclude, checkpoint, "a weight is missing from a checkpoint")["status"] == "refused"


def test_a_checkpoint_holds_code(cli, conclude, checkpoint):
    marker = cli.folder / "executed"
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    torch.save({"lm_head.weight": _Touch(marker)}, checkpoint / "pytorch_model.bin")

    assert damaged(cli, conclude, checkpoint, "a pickled checkpoint holds code")["status"] == "refused"
    assert not marker.exists()


class _Touch:
    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


# --- neighbours -------------------------------------------------------------------------------------------------------


def test_a_port_is_taken(cli, page):
    """The launcher takes a free one, whatever the environment says."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = cli.run(
            *STREAM, "tracking=none", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken.getsockname()[1]), RANK="0"
        )

    assert done.returncode == 0, done.stdout + done.stderr
    page.check("`MASTER_PORT` is taken, `WORLD_SIZE` is not set", "`ok`", "nothing: a free port is used", cli.left())


def test_two_runs_at_once(cli, page):
    """On one disk path, with one home: neither notices."""
    settings = (
        *SIX_LAYERS,
        "quant=fp16",
        "offload=nvme",
        f"offload.path={cli.folder / 'disk'}",
        "verify=off",
        "tracking=none",
    )
    first = cli.start(*settings, "workload.repeats=20")
    wait_for(first, "measure:")
    second = cli.run(*settings)
    output = end(first)

    assert second.returncode == 0, second.stdout + second.stderr
    assert first.returncode == 0, output
    assert [result["status"] for result in cli.results()] == ["ok", "ok"]
    page.check("two runs at once, with one `offload.path` and one home", "`ok`, both", "nothing", cli.left())


def test_a_neighbour_keeps_its_weights(cli):
    """Weights are abandoned only when nobody holds their lock: not those of a run that is under way."""
    process = cli.start(*LONG, "offload=nvme", f"offload.path={cli.folder / 'disk'}")
    wait_for(process, "measure:")
    done = cli.run(*STREAM, "offload=nvme", f"offload.path={cli.folder / 'disk'}", "tracking=none")
    (kept,) = (cli.folder / "disk").glob("zi-*")
    process.terminate()
    end(process)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "removed" not in done.stdout
    assert not kept.exists()


FILES = ("test_reliability.py", "test_sweep.py", "test_nodes.py")  # that write the page


def test_the_page_has_no_other_lines(page, request):
    """What is not tested any more is not promised either."""
    if len(request.session.items) < 30:
        pytest.skip("only some of the tests run")
    titles = {line.split(" | ")[0].removeprefix("| ") for line in page.rows().values()}
    sources = "".join(Path(__file__).with_name(name).read_text() for name in FILES)
    for title in titles:
        assert title.split(":")[0].split(" (")[0] in sources
