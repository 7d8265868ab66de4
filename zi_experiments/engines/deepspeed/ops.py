"""DeepSpeed compiles its operators on first use: here that happens before anything is loaded or timed."""

import logging
import time
from pathlib import Path

import psutil

from zi_experiments.config import OffloadDevice
from zi_experiments.plan import Plan
from zi_experiments.progress import Progress

log = logging.getLogger(__name__)


def build_ops(plan: Plan, progress: Progress) -> None:
    """Compile the operators that this run uses and that are not in torch's extensions cache yet."""
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    for name in _builders(plan):
        builder = get_accelerator().create_op_builder(name)
        folder = Path(_get_build_directory(builder.name, verbose=False))
        remove_stale_lock(folder)
        if not any(folder.glob("*.so")):
            progress.begin(f"build {builder.name}", 1, "operator, first use: about a minute")
        builder.load(verbose=False)
        progress.end()


def _builders(plan: Plan) -> list[str]:
    names = []
    if plan.machine.device == "cpu":
        names.append("ShareMemCommBuilder")
    if plan.run.offload.device is OffloadDevice.nvme:
        names.append("GDSBuilder" if plan.run.offload.use_gds else "AsyncIOBuilder")
    if plan.uses_cuda_quantizer:
        names.append("QuantizerBuilder")
    return names


def remove_stale_lock(folder: Path) -> None:
    """Remove the lock of a build that was interrupted; torch would wait for it for ever, without a word.

    A process that builds keeps its lock open, so a lock that nobody has open has no owner. It closes the lock just before
    it removes it: hence the second look.
    """
    lock = folder / "lock"
    if _is_abandoned(lock):
        time.sleep(1)
        if _is_abandoned(lock):
            log.warning("removing %s: the build that made it was interrupted", lock)
            lock.unlink(missing_ok=True)


def _is_abandoned(lock: Path) -> bool:
    return lock.exists() and not any(_has_open(process, lock) for process in psutil.process_iter())


def _has_open(process: psutil.Process, path: Path) -> bool:
    try:
        return any(file.path == str(path) for file in process.open_files())
    except psutil.Error:
        return False  # it has ended, or is another user's, who would have a cache of their own
