"""Sinks: where the record of a run goes. They compute nothing.

`result.json` is written first and may fail loudly; every other sink costs a warning at most.
"""

import logging
from collections.abc import Callable
from typing import Protocol

from zi_experiments.results.record import Record

log = logging.getLogger(__name__)


class Sink(Protocol):
    def open(self, record: Record) -> None:
        """A run whose plan is accepted is about to start; `record` says what it will be."""

    def write(self, record: Record) -> None:
        """The run is over; `record` is final."""

    def close(self) -> None:
        """Let go of everything, whether or not anything was written."""


class Guarded:
    """A sink whose failures are warnings, and which is left alone after the first."""

    def __init__(self, sink: Sink) -> None:
        self._sink: Sink | None = sink
        self._name = type(sink).__name__

    def open(self, record: Record) -> None:
        self._try(lambda sink: sink.open(record))

    def write(self, record: Record) -> None:
        self._try(lambda sink: sink.write(record))

    def close(self) -> None:
        self._try(lambda sink: sink.close())

    def _try(self, act: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            act(self._sink)
        except Exception as error:
            self._sink = None
            log.warning("%s failed and is skipped: %s: %s", self._name, type(error).__name__, error)
