"""Where slabs are kept: in host memory, or on disk behind a ring of host buffers."""

import ctypes
import errno
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from zi_experiments.cost_model.inventory import Home
from zi_experiments.engines.disk_access import BLOCK_BYTES
from zi_experiments.engines.stream.placement.room import PARALLEL
from zi_experiments.engines.stream.slab import PAGE

PART_BYTES = 4 << 20  # of a request for a part of a slab, unless the part is smaller
MOST_VIEWS = 1024  # of a request: the kernel's limit

Views = list[memoryview]  # parts of a buffer


class DirectFile:
    """A file of slabs that is read and written around the page cache, by several threads.

    Buffers and offsets are multiples of a page. An incomplete request raises `OSError`.
    """

    def __init__(self, path: str, nbytes: int, chunk_bytes: int | None, parallel: int | None, slabs: int) -> None:
        self._chunk_bytes = chunk_bytes or BLOCK_BYTES
        self._parallel = parallel or PARALLEL
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
        try:
            os.posix_fallocate(self._descriptor, 0, nbytes)  # a full disk is an error here, before any write
        except OSError as error:
            os.close(self._descriptor)
            os.unlink(path)
            advice = "ulimit -f unlimited" if error.errno == errno.EFBIG else "pass offload.path=/a/larger/disk"
            raise OSError(
                f"no room for the {nbytes} bytes of weights in {path} ({error.strerror}): {advice}"
            ) from error
        self._most = self._parallel * slabs  # requests at a time
        self._threads = ThreadPoolExecutor(self._most, "disk")

    def read(self, buffer: torch.Tensor, offset: int, after: Callable[[], None]) -> list[Future[None]]:
        """Start to fill `buffer` from `offset` as soon as `after()` returns. Return one future per request."""
        return self.start(os.preadv, [view_of(buffer)], offset, after)

    def read_part(self, buffer: torch.Tensor, offset: int, after: Callable[[], None]) -> list[Future[None]]:
        """The same of a part of a slab, by all threads if it is large."""
        return self.start(os.preadv, [view_of(buffer)], offset, after, is_part=True)

    def copy(self, source: torch.Tensor, buffer: torch.Tensor, after: Callable[[], None]) -> Future[None]:
        """Start to fill `buffer` from memory as soon as `after()` returns."""

        def move() -> None:
            after()
            ctypes.memmove(buffer.data_ptr(), source.data_ptr(), buffer.nbytes)

        return self._threads.submit(move)

    def write(self, buffer: torch.Tensor, offset: int) -> list[Future[None]]:
        return self.start(os.pwritev, [view_of(buffer)], offset, lambda: None)

    def start(
        self,
        request: Callable[..., int],
        views: Views,
        offset: int,
        after: Callable[[], None],
        *,
        is_part: bool = False,
    ) -> list[Future[None]]:
        """Start to move the bytes of `views`, which follow each other in the file from `offset`."""
        nbytes, started = sum(map(len, views)), []
        requests = min(self._most, max(1, nbytes // PART_BYTES)) if is_part else self._parallel
        part = -(-nbytes // requests // PAGE) * PAGE
        while views:
            first, views = split(views, part)
            started.append(self._threads.submit(self._carry_out, request, first, offset, after))
            offset += part
        return started

    def _carry_out(self, request: Callable[..., int], views: Views, offset: int, after: Callable[[], None]) -> None:
        after()
        while views:
            moved = request(self._descriptor, split(views, self._chunk_bytes)[0][:MOST_VIEWS], offset)
            if moved <= 0 or moved % PAGE:
                raise OSError(f"{request.__name__} moved {moved} bytes at {offset} of the file of weights")
            views = split(views, moved)[1]
            offset += moved

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        os.close(self._descriptor)
        os.unlink(self._path)


def view_of(buffer: torch.Tensor) -> memoryview:
    return memoryview(buffer.numpy())  # type: ignore[arg-type]


def split(views: Views, size: int) -> tuple[Views, Views]:
    """Return the first `size` bytes, and the others."""
    for index, view in enumerate(views):
        if size < len(view):
            head = [view[:size]] if size else []
            return [*views[:index], *head], [view[size:], *views[index + 1 :]]
        size -= len(view)
    return views, []


class File(Protocol):
    """What slabs are read from: a `DirectFile`, or several of them."""

    def read(self, buffer: torch.Tensor, offset: int, after: Callable[[], None]) -> list[Future[None]]: ...

    def read_part(self, buffer: torch.Tensor, offset: int, after: Callable[[], None]) -> list[Future[None]]: ...

    def copy(self, source: torch.Tensor, buffer: torch.Tensor, after: Callable[[], None]) -> Future[None]: ...

    def close(self) -> None: ...


class Store:
    """This rank's share of every slab, handed out in the order of the layers, round and round.

    A slab is a tensor in host memory, or the offset of its bytes in the file. Slabs on disk are read ahead into the
    buffers. A buffer is used again once `hand_back` releases it. Unless it `wraps`, nothing is read ahead for the next
    pass: another one may come first, which reads single experts.

    `kept` returns which parts of a slab on disk are in host memory as well, given its number: pairs of their first byte
    in the slab, in ascending order, and their bytes. They are not read, and do not change while a pass needs slabs.
    """

    def __init__(
        self,
        slabs: list[torch.Tensor | int],
        file: File | None,
        buffers: list[torch.Tensor],
        *,
        wraps: bool = True,
        kept: Callable[[int], list[tuple[int, torch.Tensor]]] | None = None,
        owners: int = 1,
    ) -> None:
        """With several `owners`, slabs are in memory of as many ranks, each of which holds an equal part."""
        self._slabs, self._file, self._buffers, self._wraps, self._kept = slabs, file, buffers, wraps, kept
        self._owners = owners
        self.sizes: list[int] = []
        self._reads: deque[list[Future[None]]] = deque()  # running or done, in the order of their slabs
        self._on_disk = [index for index, slab in enumerate(slabs) if isinstance(slab, int)]
        self._left: list[Callable[[], None]] = [lambda: None for _ in buffers]  # waits for what still uses a buffer
        self._begun = self._taken = self._released = 0  # slabs on disk so far, over all passes

    def pieces(self) -> list[tuple[Home, int]]:
        """Return where each slab is, and its bytes there that are this rank's; on disk this is its room in the file."""
        return [
            (Home.nvme, self.sizes[index]) if isinstance(slab, int) else (Home.cpu, slab.nbytes // self._owners)
            for index, slab in enumerate(self._slabs)
        ]

    def slab(self, index: int) -> torch.Tensor:
        """Return a slab that is in host memory."""
        slab = self._slabs[index]
        assert not isinstance(slab, int)
        return slab

    def start(self, sizes: list[int]) -> None:
        """Begin to read ahead; `sizes` are the bytes of this rank's share of each slab."""
        self.sizes = sizes
        self._read_ahead()

    def prefixes(self, sizes: Mapping[int, int], buffers: list[torch.Tensor]) -> "Store":
        """Return a store of the first bytes of some slabs, given by number; it reads them beside this one.

        It is closed with this one.
        """
        found = Store([self._slabs[number] for number in sizes], self._file, buffers)
        found.start(list(sizes.values()))
        return found

    def is_ready(self, index: int) -> bool:
        """Return whether `take` would not wait for the disk."""
        if not isinstance(self._slabs[index], int):
            return True
        return bool(self._reads) and all(part.done() for part in self._reads[0])

    def take(self, index: int) -> torch.Tensor:
        """Return a slab's bytes in host memory. Until `hand_back`, nothing else is written there."""
        slab = self._slabs[index]
        if not isinstance(slab, int):
            return slab[: self.sizes[index]]
        self._read_ahead(at_least=self._taken + 1)
        for part in self._reads.popleft():
            part.result()
        self._taken += 1
        return self._buffers[(self._taken - 1) % len(self._buffers)][: self.sizes[index]]

    def hand_back(self, index: int, stream: torch.cuda.Stream | None) -> None:
        """Release the slab taken last, once all operations launched on `stream` are done."""
        if not isinstance(self._slabs[index], int):
            return
        used = self._released % len(self._buffers)
        self._left[used] = stream.record_event().synchronize if stream is not None else lambda: None
        self._released += 1
        self._read_ahead()

    def read_part(self, index: int, start: int, part: torch.Tensor, after: Callable[[], None]) -> list[Future[None]]:
        """Start to fill `part` from byte `start` of a slab on disk as soon as `after()` returns: beside `take`."""
        offset = self._slabs[index]
        assert isinstance(offset, int)
        assert self._file is not None
        return self._file.read_part(part, offset + start, after)

    def _read_ahead(self, at_least: int = 0) -> None:
        """Begin to read slabs into all buffers that are free, of the pass that has begun with slab `at_least` only."""
        end = self._released + len(self._buffers)
        if not self._wraps and self._on_disk:
            count = len(self._on_disk)
            end = min(end, -(-max(at_least, self._taken) // count) * count)
        while self._begun < end:
            index, used = self._on_disk[self._begun % len(self._on_disk)], self._begun % len(self._buffers)
            self._reads.append(self._read(index, self._buffers[used][: self.sizes[index]], self._left[used]))
            self._begun += 1

    def _read(self, index: int, buffer: torch.Tensor, after: Callable[[], None]) -> list[Future[None]]:
        """Start to fill a buffer with a slab on disk as soon as `after()` returns."""
        offset = self._slabs[index]
        assert isinstance(offset, int)
        assert self._file is not None
        if self._kept is None or not (kept := self._kept(index)):
            return self._file.read(buffer, offset, after)
        requests, end = [], 0
        for start, part in kept:
            if start > end:
                requests += self._file.read_part(buffer[end:start], offset + end, after)
            end = start + len(part)
            requests.append(self._file.copy(part, buffer[start:end], after))
        return requests + (self._file.read_part(buffer[end:], offset + end, after) if end < len(buffer) else [])

    def close(self) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # copies for a pass that will not run may be in flight
        if self._file is not None:
            self._file.close()
        self._slabs, self._buffers = [], []
