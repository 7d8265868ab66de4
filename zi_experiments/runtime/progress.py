"""Progress events that workers send to the launcher, which shows them as bars in a terminal or as lines in a log."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from zi_experiments.units import gigabytes

_EVENT_INTERVAL_S = 0.1
_LINE_INTERVAL_S = 15.0


@dataclass(frozen=True, slots=True)
class Event:
    """The state of a phase that began, advanced or ended."""

    phase: str
    completed: int
    total: int
    unit: str  # "bytes", or a plural noun
    ended: bool = False


class Channel(Protocol):
    """The launcher's end of a pipe. Not a queue: a worker killed while it holds a queue's lock never releases it."""

    def poll(self, timeout: float) -> bool: ...
    def recv(self) -> Any: ...


class Progress:
    """The worker's side. Sends at most ten events a second, plus the first and last of each phase."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        self._send = send
        self._phase = Event("", 0, 0, "")
        self._sent_at = 0.0

    def begin(self, phase: str, total: int, unit: str) -> None:
        self.end()
        self._set(Event(phase, 0, total, unit), force=True)

    def advance(self, amount: int = 1) -> None:
        now = self._phase
        self._set(Event(now.phase, min(now.total, now.completed + amount), now.total, now.unit))

    def end(self) -> None:
        now = self._phase
        if now.phase:
            self._set(Event(now.phase, now.total, now.total, now.unit, ended=True), force=True)
        self._phase = Event("", 0, 0, "")

    def _set(self, event: Event, force: bool = False) -> None:
        self._phase = event
        if force or time.monotonic() - self._sent_at > _EVENT_INTERVAL_S:
            self._sent_at = time.monotonic()
            self._send(event)


def silent() -> Progress:
    """Return a progress that sends nothing, for ranks other than the first."""
    return Progress(lambda event: None)


def shown(console: Console) -> Progress:
    """Return a progress that is shown on `console`, in this process."""
    return Progress(_show(console).event)


class Display:
    """The launcher's side: a context manager that shows the events of a channel, and tells others of them."""

    def __init__(self, channel: Channel, console: Console, tell: Callable[[Event], None] = lambda event: None) -> None:
        self._channel = channel
        self._tell = tell
        self._show = _show(console)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self.last: Event | None = None
        self.heard_at = time.monotonic()  # time of the last event, or of the start

    def __enter__(self) -> "Display":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()
        self._show.close()

    def _run(self) -> None:
        while True:
            # an event is far smaller than a pipe's buffer: it arrives whole or not at all
            if self._channel.poll(_EVENT_INTERVAL_S):
                event = self._channel.recv()
                self.last, self.heard_at = event, time.monotonic()
                self._show.event(event)
                self._tell(event)
            elif self._done.is_set():
                return
            elif self.last is not None and not self.last.ended:
                self._show.event(self.last)  # no new event, but elapsed time goes on


def _show(console: Console) -> "_Bars | _Lines":
    return _Bars(console) if console.is_terminal else _Lines(console)


class _Bars:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Bars | None = None
        self._phase = ""
        self._began = 0.0

    def event(self, event: Event) -> None:
        if event.phase != self._phase or self._bars is None:
            self.close()
            self._phase = event.phase
            self._began = time.monotonic()
            amount = DownloadColumn() if event.unit == "bytes" else MofNCompleteColumn()
            self._bars = Bars(
                TextColumn("{task.description:<8}"),
                BarColumn(bar_width=20),
                amount,
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bars.add_task(event.phase, total=event.total, rate="")
            self._bars.start()
        rate = _rate(event, time.monotonic() - self._began)
        self._bars.update(self._bars.task_ids[0], completed=event.completed, rate=rate)
        if event.ended:
            self.close()

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._began = self._printed = 0.0

    def event(self, event: Event) -> None:
        now = time.monotonic()
        if event.phase != self._phase:
            self._phase, self._began, self._printed = event.phase, now, now
            self._console.print(f"{event.phase}: {_amount(event.total, event.unit)}", highlight=False)
            return
        elapsed = now - self._began
        if event.ended:
            self._console.print(f"{event.phase}: done in {elapsed:.1f} s", highlight=False)
        elif now - self._printed > _LINE_INTERVAL_S:
            self._printed = now
            state = f"{elapsed:.0f} s so far"  # no rate to estimate the remaining time from
            if event.completed:
                left = elapsed * (event.total - event.completed) / event.completed
                done = f"{100 * event.completed / event.total:.0f} %"
                state = f"{done}, {_rate(event, elapsed)}, {left:.0f} s left"
            self._console.print(f"{event.phase}: {state}", highlight=False)

    def close(self) -> None:
        pass


def _rate(event: Event, elapsed: float) -> str:
    """Return how fast a phase goes, in what changes from look to look: a rate, or seconds of each; at first its unit."""
    if not event.completed or event.total == 1:
        return "" if event.unit == "bytes" else event.unit
    rate = event.completed / max(elapsed, 1e-9)
    if event.unit == "bytes":
        return f"{gigabytes(rate)}/s"
    if rate < 1:
        return f"{1 / rate:.1f} s per {event.unit.removesuffix('s')}"
    return f"{rate:.{0 if rate >= 10 else 1}f} {event.unit}/s"


def _amount(amount: int, unit: str) -> str:
    return gigabytes(amount, 1) if unit == "bytes" else f"{amount} {unit}"
