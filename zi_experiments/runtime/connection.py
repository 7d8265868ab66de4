"""A connection between two processes of one command, on the same machine or on two, that notices when the other is gone."""

import queue
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

_BEAT_S = 1.0


class Peer:
    """The other end of a connection. Messages are pickled; each side says every second that it is alive."""

    def __init__(self, connection: Connection, number: int, host: str, silence_s: float) -> None:
        self.number = number
        self.host = host
        self._silence_s = silence_s
        self._connection = connection
        self._lock = threading.Lock()
        self._received: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._heard_at = time.monotonic()
        self._is_closed = False
        for act in (self._listen, self._beat):
            threading.Thread(target=act, name=f"peer {number}", daemon=True).start()

    def send(self, message: Any) -> None:
        """Send a message; nothing happens if the other side is gone, which `lost` says."""
        with suppress(OSError), self._lock:
            self._connection.send(message)

    def receive(self, timeout_s: float) -> Any:
        """Return the next message; None if there is none for so long."""
        try:
            return self._received.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def lost(self) -> str | None:
        """Return how the other side was lost; None while it is there, or has something to be received."""
        if not self._received.empty():
            return None
        if self._is_closed:
            return "its launcher has ended"
        if time.monotonic() - self._heard_at > self._silence_s:
            return f"not heard of for {self._silence_s:g} s"
        return None

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                message = self._connection.recv()
                self._heard_at = time.monotonic()
                if message is not None:
                    self._received.put(message)
        self._is_closed = True

    def _beat(self) -> None:
        while not self._is_closed:
            self.send(None)
            time.sleep(_BEAT_S)
