"""Memory that several processes share counts once."""

import mmap
import os
import signal

import psutil

from zi_experiments.runtime import fork_server, peak_memory, shared_memory

SIZE = 64 << 20


def touched(descriptor):
    pages = mmap.mmap(descriptor, SIZE)
    pages.write(b"\1" * SIZE)
    return pages


def test_what_two_processes_share_is_counted_once():
    descriptor = os.memfd_create("slab")
    os.ftruncate(descriptor, SIZE)
    before = shared_memory.resident_bytes(os.getpid())
    mine = touched(descriptor)
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        theirs = touched(descriptor)
        os.write(told, b"1")
        signal.pause()
        os._exit(len(theirs))
    try:
        os.read(ready, 1)
        assert shared_memory.resident_bytes(os.getpid()) - before >= SIZE
        assert shared_memory.resident_bytes(child) >= SIZE
        this = psutil.Process()
        everyone = (this, *this.children(recursive=True))  # earlier tests may have left a fork server
        separate = sum(one.memory_info().rss for one in everyone if one.pid != fork_server.number())
        assert separate - peak_memory._resident_bytes() > 0.9 * SIZE
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        mine.close()
        for each in (descriptor, ready, told):
            os.close(each)
    assert shared_memory.resident_bytes(child) == 0
