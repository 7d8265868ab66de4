"""Standard streams that cannot hurt a run: what nobody can read, or no longer, is no reason to end it."""

import io
import os
import sys
from typing import TextIO


def install() -> None:
    """From now on writing to stdout and stderr cannot fail: closed, full, without a reader, or short of characters."""
    for descriptor in range(3):
        _occupy(descriptor)
    sys.stdout, sys.stderr = _forgiving(1, sys.stdout), _forgiving(2, sys.stderr)


def _occupy(descriptor: int) -> None:
    """A closed one would be the next file that is opened, for all to write to."""
    try:
        os.fstat(descriptor)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free


def _forgiving(descriptor: int, stream: TextIO | None) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(_Forgiving(descriptor, "w", closefd=False)),  # type: ignore[type-var]
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=bool(stream and stream.line_buffering),
    )


class _Forgiving(io.FileIO):
    def write(self, data: bytes) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError:
            return len(data)
