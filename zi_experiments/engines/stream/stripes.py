"""Slabs in one file on each of several drives, in stripes, so that all drives work at the same time."""

import os
from collections.abc import Callable
from concurrent.futures import Future

import torch

from zi_experiments.engines.stream.store import DirectFile, Views, split, view_of

STRIPE_BYTES = 1 << 20  # a small slab, or an expert, is on all drives too; a request takes several stripes of its drive


def open_files(
    paths: list[str], nbytes: int, chunk_bytes: int | None, parallel: int | None, slabs: int
) -> "DirectFile | Striped":
    """Return a new file for `nbytes` of slabs, or files in stripes; each drive is read by as many requests."""
    if len(paths) > 1:
        return Striped(paths, nbytes, chunk_bytes, parallel, slabs)
    return DirectFile(paths[0], nbytes, chunk_bytes, parallel, slabs)


class Striped:
    """Files that are used as one: its n-th stripe is in file n modulo files. Offsets are multiples of a page."""

    def __init__(
        self, paths: list[str], nbytes: int, chunk_bytes: int | None, parallel: int | None, slabs: int
    ) -> None:
        self._files: list[DirectFile] = []
        stripes = -(-nbytes // STRIPE_BYTES)
        try:
            for number, path in enumerate(paths):
                own = max(1, len(range(number, stripes, len(paths)))) * STRIPE_BYTES
                self._files.append(DirectFile(path, own, chunk_bytes, parallel, slabs))
        except OSError:
            self.close()
            raise

    def read(self, buffer: torch.Tensor, offset: int, after: Callable[[], None]) -> list[Future[None]]:
        """Start to fill `buffer` from `offset` as soon as `after()` returns. Return one future per request."""
        return self._start(os.preadv, buffer, offset, after)

    def read_part(self, buffer: torch.Tensor, offset: int, after: Callable[[], None]) -> list[Future[None]]:
        """The same of a part of a slab."""
        return self._start(os.preadv, buffer, offset, after, is_part=True)

    def copy(self, source: torch.Tensor, buffer: torch.Tensor, after: Callable[[], None]) -> Future[None]:
        """Start to fill `buffer` from memory as soon as `after()` returns."""
        return self._files[0].copy(source, buffer, after)

    def write(self, buffer: torch.Tensor, offset: int) -> list[Future[None]]:
        return self._start(os.pwritev, buffer, offset, lambda: None)

    def _start(
        self,
        request: Callable[..., int],
        buffer: torch.Tensor,
        offset: int,
        after: Callable[[], None],
        *,
        is_part: bool = False,
    ) -> list[Future[None]]:
        parts: list[Views] = [[] for _ in self._files]
        starts = [0] * len(parts)
        views, position = [view_of(buffer)], offset
        while views:
            stripe, within = divmod(position, STRIPE_BYTES)
            row, number = divmod(stripe, len(parts))
            if not parts[number]:
                starts[number] = row * STRIPE_BYTES + within
            taken, views = split(views, STRIPE_BYTES - within)
            parts[number] += taken
            position += len(taken[0])
        started = zip(self._files, parts, starts, strict=True)
        return [one for file, own, start in started for one in file.start(request, own, start, after, is_part=is_part)]

    def close(self) -> None:
        for file in self._files:
            file.close()
