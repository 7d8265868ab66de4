"""A process that has imported what a worker needs, and from which each worker is forked: imports are paid once a command."""

import gc
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker, util

from zi_experiments.runtime import scratch, signals

_number: int | None = None  # of the server's process


def start() -> None:
    """Fork the server from this process, with the modules that it has imported; once.

    To be called before this process asks NVML or CUDA for GPUs, neither of which works in a copy of a process that has.
    Does nothing where threads would be missing in the copy, or a CUDA context is there already.
    """
    if _number is not None or threading.active_count() > 1 or _has_cuda_context():
        return
    place = scratch.Scratch(scratch.for_temporary_files(uuid.uuid4().hex[:12]))
    util.Finalize(None, place.close, exitpriority=-200)  # after what multiprocessing removes in there
    resource_tracker.ensure_running()  # executed, as it is anyway
    # its socket is a file, which may have no long name, and which the next command removes if this one is killed
    with _forked_instead_of_executed(), scratch.temporary_files_in(place.path), suppress(OSError):
        forkserver.ensure_running()


def start_method() -> str:
    """Return how `multiprocessing` starts a worker: `forkserver`, or `spawn` where there is no server."""
    return "spawn" if _number is None else "forkserver"


def number() -> int | None:
    """Return the process number of the server; None where there is none."""
    return _number


def _has_cuda_context() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


@contextmanager
def _forked_instead_of_executed() -> Iterator[None]:
    """`multiprocessing` executes a new Python for its server, which would have to import everything again."""
    execute = util.spawnv_passfds
    util.spawnv_passfds = _fork  # type: ignore[assignment]
    try:
        yield
    finally:
        util.spawnv_passfds = execute


def _fork(path: bytes, arguments: Sequence[str], descriptors: Sequence[int]) -> int:
    """Return the number of a new process, which does what `python -c` would: the last of the arguments."""
    global _number
    if number := os.fork():
        _number = number
        return number
    try:
        from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

        _prctl_pr_set_pdeathsig(signal.SIGKILL)  # and the workers go with the server
        signals.restore()
        gc.freeze()  # no worker has to look through what was imported, which takes half a second
        for each in map(int, os.listdir("/proc/self/fd")):
            if each > 2 and each not in descriptors:
                with suppress(OSError):
                    os.close(each)  # the server ends when the last process has closed its end of a pipe
        exec(arguments[-1], {})
    finally:
        os._exit(0)
