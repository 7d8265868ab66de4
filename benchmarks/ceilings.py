"""What this machine can do at best, measured with nothing in the way: plain copies, one product, reads around the cache."""

import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

GIB = 1 << 30
GEMM = 8192
DISK_BYTES, DISK_REQUEST_BYTES, DISK_READERS = 4 * GIB, 8 << 20, 8


def link_bytes_per_s() -> float:
    """From pinned host memory to the first GPU, in copies of 1 GiB."""
    import torch

    from zi_experiments.pinned import host_empty

    host = host_empty(GIB, torch.uint8, pinned=True)
    there = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    return _rate(GIB, lambda: there.copy_(host, non_blocking=True), repeats=7)


def flops() -> float:
    """Of a float16 product of square matrices. Of random numbers: zeros draw less power and are faster."""
    import torch

    a, b = (torch.randn(GEMM, GEMM, dtype=torch.float16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return _rate(2 * GEMM**3, lambda: torch.mm(a, b, out=out), repeats=50)


def hbm_bytes_per_s() -> float:
    """Bytes read and bytes written by a copy within the GPU's memory."""
    import torch

    source = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return _rate(2 * source.nbytes, lambda: target.copy_(source), repeats=20)


def release() -> None:
    """Give the GPU's memory back, for what is measured next."""
    import torch

    torch.cuda.empty_cache()


def _rate(amount: float, work: Callable[[], object], repeats: int) -> float:
    """`amount` over the median of several times, after one that warms up."""
    import torch

    work()
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return amount / median(seconds)


def disk_bytes_per_s(folder: Path, nbytes: int = DISK_BYTES) -> float:
    """Of several readers with O_DIRECT, each with requests of 8 MiB, over a file in `folder` that is written for it."""
    path = folder / "ceiling"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
    try:
        _all_readers(os.pwritev, descriptor, nbytes)
        os.fsync(descriptor)
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            _all_readers(os.preadv, descriptor, nbytes)
            seconds.append(time.perf_counter() - began)
        return nbytes / median(seconds)
    finally:
        os.close(descriptor)
        path.unlink()


def _all_readers(request: Callable[..., int], descriptor: int, nbytes: int) -> None:
    def one(reader: int) -> None:
        # anonymous pages: O_DIRECT wants an aligned buffer
        with mmap.mmap(-1, DISK_REQUEST_BYTES) as buffer:
            buffer.write(os.urandom(DISK_REQUEST_BYTES) if request is os.pwritev else b"")
            for offset in range(reader * DISK_REQUEST_BYTES, nbytes, DISK_READERS * DISK_REQUEST_BYTES):
                moved = request(descriptor, [buffer], offset)
                if moved != DISK_REQUEST_BYTES:
                    raise OSError(f"{request.__name__} moved {moved} of {DISK_REQUEST_BYTES} bytes at {offset}")

    with ThreadPoolExecutor(DISK_READERS) as threads:
        list(threads.map(one, range(DISK_READERS)))
