"""Sinks: where the record of a run goes. They compute nothing.

`result.json` is written first, and its failure is an error. A failure of any other sink is only a warning.
"""

import logging
from collections.abc import Callable
from typing import Protocol

from zi_experiments.results.record import Record
from zi_experiments.runtime.progress import Event

log = logging.getLogger(__name__)


class Sink(Protocol):
    def open(self, record: Record) -> None:
        """Called when the plan is accepted, before the run starts; `record` has the plan."""

    def progress(self, event: Event) -> None:
        """Called while the run is under way, in another thread; has to return at once."""

    def write(self, record: Record) -> None:
        """Called when the run is over; `record` is final. Without a call of `open` before, it was refused."""

    def close(self) -> None:
        """Release everything, whether or not anything was written."""


class Guarded:
    """A sink whose failures are warnings; it is skipped after the first one."""

    def __init__(self, sink: Sink) -> None:
        self._sink: Sink | None = sink
        self._name = type(sink).__name__

    def open(self, record: Record) -> None:
        self._try(lambda sink: sink.open(record))

    def progress(self, event: Event) -> None:
        self._try(lambda sink: sink.progress(event))

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
