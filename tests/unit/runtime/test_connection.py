"""Two ends of a connection: what arrives, and how one learns that the other is gone."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Listener

import pytest

from zi_experiments.runtime.connection import Peer

OTHER = """
import sys, time
from multiprocessing.connection import Client
from zi_experiments.runtime.connection import Peer

peer = Peer(Client(sys.argv[1]), 0, "first", 30.0)
peer.send({"answer": peer.receive(30)})
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """A process at the other end, and this end, which gives up after 3 s."""
    with Listener(str(tmp_path / "socket")) as listener:
        process = subprocess.Popen([sys.executable, "-c", OTHER, str(tmp_path / "socket")])
        yield process, Peer(listener.accept(), 1, "second", 3.0)
    process.kill()
    process.wait()


def test_messages_arrive_before_it_is_noticed_that_the_other_is_gone(other):
    process, peer = other
    peer.send("question")
    assert peer.receive(30) == {"answer": "question"}
    assert peer.lost() is None
    process.kill()

    assert lost(peer) == "its launcher has ended"
    peer.send("nobody hears this")


def test_a_process_that_stands_still_is_lost(other):
    process, peer = other
    os.kill(process.pid, signal.SIGSTOP)

    assert lost(peer) == "not heard of for 3 s"


def lost(peer):
    end = time.monotonic() + 60
    while (how := peer.lost()) is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    return how
