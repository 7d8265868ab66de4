import shutil
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from cli import Cli
from torch.utils import file_baton

from zi_experiments.engines.deepspeed.operators import operators, wait_for_lock
from zi_experiments.runtime.progress import Progress, silent
from zi_experiments.system import toolchain

REMOVED = "removed the lock of an interrupted build of async_io"
BUILDER = """
import runpy, sys
baton = runpy.run_path(sys.argv[1])["FileBaton"](sys.argv[2])  # torch's, without the time that importing torch takes
assert baton.try_acquire()
print("acquired", flush=True)
sys.stdin.read()
baton.release()
"""


@pytest.fixture
def folder(tmp_path):
    """The folder of an operator in torch's cache."""
    folder = tmp_path / "async_io"
    folder.mkdir()
    return folder


def build(folder):
    """A process that holds the lock as torch does while it builds, until its standard input is closed."""
    command = [sys.executable, "-c", BUILDER, file_baton.__file__, str(folder / "lock")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "acquired\n"
    return process


@pytest.fixture
def builder(folder):
    with build(folder) as process:
        yield process
        process.kill()


class Waiting:
    """A wait under way, and its events with the times at which they came."""

    def __init__(self, folder: Path) -> None:
        self.events = []
        progress = Progress(lambda event: self.events.append((time.monotonic(), event)))
        self.thread = threading.Thread(target=wait_for_lock, args=(folder, progress))
        self.thread.start()

    def phases(self):
        return [event.phase for _, event in self.events if not event.completed]


def test_no_lock_is_no_wait(folder):
    began, events = time.monotonic(), []

    wait_for_lock(folder, Progress(events.append))

    assert time.monotonic() - began < 0.1
    assert events == []


def test_the_lock_of_an_interrupted_build_is_removed_and_the_user_is_told(folder):
    (folder / "lock").touch()
    events = []

    wait_for_lock(folder, Progress(events.append))

    assert not (folder / "lock").exists()
    assert [(event.phase, event.ended) for event in events] == [(REMOVED, False), (REMOVED, True)]


def test_a_build_is_waited_for_with_a_sign_of_life_every_second(folder, builder):
    waiting = Waiting(folder)
    time.sleep(3)

    assert waiting.thread.is_alive()
    assert (folder / "lock").exists()
    times = [at for at, _ in waiting.events]
    assert all(later - earlier < 1.5 for earlier, later in pairwise(times))
    assert len(times) >= 3
    builder.stdin.close()
    waiting.thread.join(5)
    assert not waiting.thread.is_alive()
    assert set(waiting.phases()) == {f"wait for process {builder.pid}, which builds async_io"}


def test_the_lock_of_a_build_that_is_killed_meanwhile_is_removed(folder, builder):
    waiting = Waiting(folder)
    time.sleep(1.5)
    builder.kill()
    builder.wait()
    waiting.thread.join(5)

    assert not waiting.thread.is_alive()
    assert not (folder / "lock").exists()
    assert waiting.phases()[-1] == REMOVED


def test_a_lock_is_known_by_its_file_however_the_cache_is_named(folder, builder, tmp_path):
    (tmp_path / "elsewhere").symlink_to(folder, target_is_directory=True)

    assert toolchain.lock_owner(tmp_path / "elsewhere" / "lock") == builder.pid


def test_a_lock_that_another_rank_has_made_instead_of_an_abandoned_one_is_kept(folder):
    """Both ranks find the lock of an interrupted build. One removes it and begins to build while the other still looks."""
    (folder / "lock").touch()
    second = threading.Thread(target=wait_for_lock, args=(folder, silent()))
    baton = file_baton.FileBaton(str(folder / "lock"))

    second.start()
    time.sleep(0.3)
    (folder / "lock").unlink()
    assert baton.try_acquire()
    time.sleep(1.2)

    assert (folder / "lock").exists()
    baton.release()
    second.join(5)
    assert not second.is_alive()


@pytest.mark.parametrize(
    ("overrides", "on", "expected"),
    [
        (["offload=cpu", "quant=int4"], "cpu", ["ShareMemCommBuilder"]),
        (["offload=nvme", "quant=fp16"], "cpu", ["ShareMemCommBuilder", "PinMemoryBuilder", "AsyncIOBuilder"]),
        (["offload=cpu", "quant=fp16"], "h200", []),
        (["offload=cpu", "quant=int4"], "h200", ["QuantizerBuilder"]),
        (["offload=nvme", "offload.use_gds=true", "quant=fp16"], "h200", ["PinMemoryBuilder", "GDSBuilder"]),
    ],
)
def test_the_operators_of_a_plan(make_plan, machine, overrides, on, expected):
    assert operators(make_plan(*overrides, on=machine(on))) == expected


def test_a_run_tells_of_the_build_that_it_waits_for(tmp_path):
    """The console of a whole run: another process holds the lock and is killed; what it leaves is removed."""
    built = toolchain.extensions_folder() / "deepspeed_shm_comm"
    copied = tmp_path / "extensions" / built.name
    copied.mkdir(parents=True)
    if (built / f"{built.name}.so").is_file():  # or else the run compiles it
        shutil.copytree(built, copied, ignore=shutil.ignore_patterns("lock"), dirs_exist_ok=True)
    lines = []
    with build(copied) as builder:
        running = Cli(tmp_path).start("tracking=none", "verify=off", TORCH_EXTENSIONS_DIR=str(copied.parent))
        for line in running.stdout:
            lines.append(line)
            if line.startswith("wait for process"):
                builder.kill()

    assert running.wait() == 0, lines
    phases = [line.partition(": ")[0] for line in lines]
    waited = phases.index(f"wait for process {builder.pid}, which builds {built.name}")
    assert phases.index(f"removed the lock of an interrupted build of {built.name}") > waited
