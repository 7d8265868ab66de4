"""Processes forked from one that has imported everything; each scene is a script, since pytest has threads."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

SCRIPT = """
import json, multiprocessing, os, signal, sys, threading, time
from zi_experiments.runtime import fork_server, signals

def look(connection):
    # its variables and handlers, and what was in memory when it was forked
    connection.send([getattr(sys, "marker", None), signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, os.getpid()])
    if "wait" in sys.argv:
        time.sleep(600)

def main():
    signals.install()
    sys.marker = "in memory"
    if "thread" in sys.argv:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    fork_server.start()
    fork_server.start()
    context = multiprocessing.get_context(fork_server.start_method())
    here, there = context.Pipe()
    process = context.Process(target=look, args=(there,))
    process.start()
    print(json.dumps([fork_server.start_method(), *here.recv(), os.getpid()]), flush=True)
    if "wait" in sys.argv:
        process.join()
        print(process.exitcode, flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def start(tmp_path):
    """`start(*words, **variables)` → a script under way, and what it has seen of its child; killed at the end."""
    (tmp_path / "script.py").write_text(SCRIPT)
    started = []

    def start(*words, **variables):
        command = [sys.executable, tmp_path / "script.py", *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | variables)
        started.append(process)
        method, marker, has_no_handler, child, launcher = json.loads(process.stdout.readline())
        assert has_no_handler
        assert launcher == process.pid
        return process, method, marker, child

    yield start
    for process in started:
        for each in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
        process.stdout.close()


def gone(pid, timeout_s=60):
    end = time.monotonic() + timeout_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_process_has_what_was_in_memory_when_the_server_began(start):
    process, method, marker, child = start("wait")

    assert (method, marker) == ("forkserver", "in memory")
    server = psutil.Process(child).parent()
    assert server.parent().pid == process.pid


def test_how_a_process_ended_is_known(start):
    process, _, _, child = start("wait")
    os.kill(child, 9)

    assert process.communicate()[0] == "-9\n"
    assert process.returncode == 0


def test_the_server_goes_with_the_command(start):
    process, _, _, child = start("wait")
    server = psutil.Process(child).parent().pid
    process.kill()

    gone(server)
    os.kill(child, 9)  # a worker asks the kernel for its own end


@pytest.mark.parametrize("reason", ["thread", "long"])
def test_where_it_cannot_work_processes_are_spawned(start, tmp_path, reason):
    """A copy has no threads, and a socket no long name."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    _, method, marker, _ = start(reason, **({"TMPDIR": str(folder)} if reason == "long" else {}))

    assert (method, marker) == ("spawn", None)


def test_nothing_stays_behind(start, tmp_path):
    process, *_ = start(TMPDIR=str(tmp_path))
    process.communicate()

    assert process.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]
