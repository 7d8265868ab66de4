"""Measure how fast disks read and write with O_DIRECT, together, with as many requests in flight as a run has."""

import os
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from math import inf
from pathlib import Path
from threading import Barrier, BrokenBarrierError

from zi_experiments.runtime.pinned_memory import Pages
from zi_experiments.system.disk import Disk, existing, mount_of

_MOST_BYTES = 1 << 30  # of the file, if no size is given: some filesystems take seconds to free a larger one
_LEAST_REQUESTS = 4
_EVEN = 0.8  # rates of drives that differ by less are as good as equal
_MOMENTS = 4  # the best of them is the ceiling
_MEMORY = ("tmpfs", "ramfs")  # newer kernels accept O_DIRECT there, and copy from memory


def bytes_per_s(
    disk: Disk, each_way_s: float = 2.0, file_bytes: int | None = None
) -> tuple[list[float], float, list[str]]:
    """Return the read rates at several moments and the write rate, in bytes per second, and notes on them.

    Of several folders they are read together, and the rates are those of a run: each has an equal part of the bytes, so
    all wait for the slowest. Measured in files that have no names, so they never stay behind. Together they have
    `file_bytes`, or else what is written in `each_way_s`, at most 1 GiB: a disk with a cache reads that faster.
    Raises `OSError`, with a message of one line, if there is no space, no permission, or no disk below the filesystem.
    """
    one_at_a_time = Barrier(len(disk.folders))

    def measure(folder: Path) -> tuple[list[float], float]:
        try:
            return _bytes_per_s(existing(folder), disk, each_way_s, file_bytes, one_at_a_time)
        except BaseException:
            one_at_a_time.abort()  # the others would wait forever
            raise

    with ThreadPoolExecutor(len(disk.folders), "folder") as threads:
        running = [threads.submit(measure, folder) for folder in disk.folders]
    failed = [error for one in running if (error := one.exception()) and not isinstance(error, BrokenBarrierError)]
    if failed:
        raise failed[0]
    rates = [one.result() for one in running]
    together = [len(rates) * min(moment) for moment in zip(*(reads for reads, _ in rates), strict=True)]
    written = len(rates) * min(write for _, write in rates)
    return together, written, _notes(disk.folders, [max(reads) for reads, _ in rates])


def _notes(folders: tuple[Path, ...], rates: list[float]) -> list[str]:
    slowest, fastest = min(rates), max(rates)
    if slowest >= _EVEN * fastest:
        return []
    slow, fast = (folders[rates.index(rate)] for rate in (slowest, fastest))
    return [
        f"{slow} reads {slowest / 1e9:.1f} GB/s while {fast} reads {fastest / 1e9:.1f}: each has an equal part of the "
        "weights, so all wait for the slowest"
    ]


def _bytes_per_s(
    folder: Path, disk: Disk, each_way_s: float, file_bytes: int | None, together: Barrier
) -> tuple[list[float], float]:
    """Return the rates of one folder, which begins each measurement when all others do."""
    if mount_of(folder).kind in _MEMORY:
        raise OSError(f"{folder} is memory, not a disk: pass offload.path=/a/folder/on/NVMe")
    most = file_bytes // len(disk.folders) if file_bytes else _MOST_BYTES
    blocks = min(most, shutil.disk_usage(folder).free // 2 // len(disk.folders)) // disk.block_bytes
    if blocks < _LEAST_REQUESTS:
        raise OSError(f"{folder} has no space for {2 * _LEAST_REQUESTS} requests of {disk.block_bytes} bytes")
    in_flight = min(disk.in_flight, blocks)
    region = blocks // in_flight * disk.block_bytes
    with ExitStack() as held:
        descriptor = _nameless(folder)
        held.callback(os.close, descriptor)
        with suppress(OSError):  # if not supported, the file grows while it is written
            os.posix_fallocate(descriptor, 0, in_flight * region)
        buffers = [held.enter_context(Pages(disk.block_bytes)) for _ in range(in_flight)]
        random = os.urandom(disk.block_bytes)  # a disk that compresses gains nothing
        for buffer in buffers:
            buffer.write(random)
        everything = [region // disk.block_bytes] * in_flight
        together.wait()
        write_s = inf if file_bytes else each_way_s
        written, write_rate = _carry_out(os.pwritev, descriptor, buffers, region, everything, write_s)
        os.fdatasync(descriptor)
        reads, read = [], [0] * in_flight
        for _ in range(_MOMENTS):
            together.wait()
            read, rate = _carry_out(os.preadv, descriptor, buffers, region, written, each_way_s / _MOMENTS, read)
            reads.append(rate)
        return reads, write_rate


def _nameless(folder: Path) -> int:
    path = folder / f".zi-{uuid.uuid4().hex[:12]}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
    except OSError as error:
        with suppress(OSError):  # if O_DIRECT is refused, the file may have been created nevertheless
            path.unlink()
        raise OSError(f"a file with O_DIRECT cannot be created in {folder} ({error.strerror})") from error
    path.unlink()
    return descriptor


def _carry_out(
    request: Callable[..., int],
    descriptor: int,
    buffers: list[Pages],
    region: int,
    blocks: list[int],
    seconds: float,
    earlier: list[int] | None = None,
) -> tuple[list[int], float]:
    """Return how many requests each buffer has completed by then, and the bytes per second.

    Each buffer goes once through `blocks` of its own region; with `earlier`, the number of its requests before, it goes on
    there, round and round until the time is over. Engines read in the same pattern, one part of a layer per request:
    distant requests suit arrays of several devices better than a single sequential stream.
    """
    began, first = time.perf_counter(), earlier or [0] * len(buffers)

    def work(number: int) -> int:
        buffer, most, done = buffers[number], blocks[number], first[number]
        while done == first[number] or ((earlier is not None or done < most) and time.perf_counter() - began < seconds):
            moved = request(descriptor, [buffer], number * region + done % most * len(buffer))
            if moved != len(buffer):
                raise OSError(f"{request.__name__} moved {moved} of {len(buffer)} bytes")
            done += 1
        return done

    with ThreadPoolExecutor(len(buffers), "disk") as threads:
        done = list(threads.map(work, range(len(buffers))))
    return done, (sum(done) - sum(first)) * len(buffers[0]) / (time.perf_counter() - began)
