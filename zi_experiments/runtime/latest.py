"""The newest progress event, told by a thread of its own."""

import threading
from collections.abc import Callable
from contextlib import suppress

from zi_experiments.runtime.progress import Event

_INTERVAL_S = 5.0


class Latest:
    """Tells when a phase begins, and every few seconds how far it is: `tell` may block or fail, and delays nobody."""

    def __init__(self, tell: Callable[[Event], None]) -> None:
        self._tell = tell
        self._newest: Event | None = None
        self._is_closed = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="latest", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        begins = self._newest is None or event.phase != self._newest.phase
        self._newest = event
        if begins:
            self._wake.set()

    def close(self, timeout_s: float) -> None:
        """Tell the newest event if it has not been told yet, in `timeout_s` at most."""
        self._is_closed = True
        self._wake.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        told: Event | None = None
        is_last = False
        while not is_last:
            self._wake.wait(_INTERVAL_S)
            self._wake.clear()
            is_last, event = self._is_closed, self._newest  # in this order: nothing is put after closing
            if event is not None and event is not told:
                told = event
                with suppress(Exception):  # who writes the results next meets the same, and says so
                    self._tell(event)
