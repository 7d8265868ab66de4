"""Standard streams whose failures do not end a run: output that nobody can read is dropped."""

import io
import os
import sys
from typing import TextIO

from zi_experiments import environment


def install() -> None:
    """Make writes to stdout and stderr safe: closed, on a full disk, without a reader, or with a limited encoding."""
    environment.forget_no_width()
    for descriptor in range(3):
        _occupy(descriptor)
    sys.stdout, sys.stderr = _forgiving(1, sys.stdout), _forgiving(2, sys.stderr)


def _occupy(descriptor: int) -> None:
    """Open a closed descriptor: the next file opened would get its number, and output would be written into it."""
    try:
        os.fstat(descriptor)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number


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
