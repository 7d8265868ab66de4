"""Compile DeepSpeed's operators before anything is loaded or timed; DeepSpeed itself compiles them on first use."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zi_experiments.config.schema import OffloadDevice
from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines.deepspeed import placement
from zi_experiments.runtime.progress import Progress
from zi_experiments.system import toolchain

_INTERVAL_S = 0.5
_PATIENCE_S = 5.0  # torch takes up to two seconds to find that an operator is compiled


def operators(plan: Plan) -> list[str]:
    """Return the names of DeepSpeed's builders of the operators that a plan uses, each after those that it needs."""
    names = []
    if plan.machine.device == "cpu":
        names.append("ShareMemCommBuilder")
    if plan.run.offload.device is OffloadDevice.nvme:
        names += ["PinMemoryBuilder", "GDSBuilder" if plan.run.offload.use_gds else "AsyncIOBuilder"]
    if placement.uses_cuda_quantizer(plan):
        names.append("QuantizerBuilder")
    return names


def usual(device: str) -> list[str]:
    """Return the builders of the operators that runs on "cuda" or "cpu" use with default settings or with offload=nvme."""
    return ["PinMemoryBuilder", "AsyncIOBuilder", "QuantizerBuilder" if device == "cuda" else "ShareMemCommBuilder"]


def build(names: list[str], progress: Progress) -> None:
    """Compile the operators of these builders that are not in torch's extensions cache yet."""
    from deepspeed.accelerator import get_accelerator

    for name in names:
        builder = get_accelerator().create_op_builder(name)
        wait_for_lock(toolchain.extensions_folder() / builder.name, progress)
        with _shown_if_slow(f"build {builder.name}", progress):
            builder.load(verbose=False)


@contextmanager
def _shown_if_slow(phase: str, progress: Progress) -> Iterator[None]:
    """Show a phase that takes long: only torch knows if a cached operator is compiled again, for new sources, say."""
    timer = threading.Timer(_PATIENCE_S, progress.begin, (phase, 1, "operator, compiled once: takes minutes"))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        progress.end()


def wait_for_lock(folder: Path, progress: Progress) -> None:
    """Wait until no other process builds the operator in this folder, and remove the lock of an interrupted build.

    torch waits silently, and forever when the process that made the lock is gone. A process that builds keeps its lock
    open, so a lock that no process has open has no owner. The owner closes its lock just before it removes it: hence
    the second look. Both looks are at the same lock, since another rank may have removed it and made its own.
    """
    lock = folder / "lock"
    waits_for = None
    while (seen := _identity(lock)) is not None:
        owner = toolchain.lock_owner(lock)
        time.sleep(_INTERVAL_S)
        if _identity(lock) != seen or toolchain.lock_owner(lock) != owner:
            continue
        if owner is None:
            _remove(lock, seen, progress)
        elif owner != waits_for:
            waits_for = owner
            progress.begin(f"wait for process {owner}, which builds {folder.name}", 1, "operator")
        else:
            progress.advance(0)
    progress.end()


def _remove(lock: Path, seen: tuple[int, int], progress: Progress) -> None:
    if _identity(lock) == seen:
        lock.unlink(missing_ok=True)
        progress.begin(f"removed the lock of an interrupted build of {lock.parent.name}", 1, "lock")


def _identity(lock: Path) -> tuple[int, int] | None:
    """Return what distinguishes a lock from a later one at the same path; None: there is no lock."""
    try:
        status = lock.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_ctime_ns
