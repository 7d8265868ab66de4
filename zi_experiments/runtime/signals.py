"""Ctrl-C and the signals of shells and schedulers all end a run by `KeyboardInterrupt`, with the signal's name."""

import signal
from collections.abc import Callable
from functools import partial
from typing import Any

# schedulers send SIGUSR1 or SIGUSR2 before a job's time limit
_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def install(before: Callable[[], None] = lambda: None) -> None:
    """Let these signals call `before` and raise `KeyboardInterrupt` in the main thread; ignored ones (nohup) stay ignored."""
    for number in _STOP:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, partial(_stop, before))


def restore() -> None:
    """From now on they end the process again, but for those that are ignored."""
    for number in _STOP:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def check() -> None:
    """Raise the `KeyboardInterrupt` again if it was raised and has not been acknowledged."""
    if signal.getitimer(signal.ITIMER_REAL)[1]:
        signal.raise_signal(signal.SIGALRM)


def acknowledge() -> None:
    """Stop raising, and ignore further signals: the clean-up that follows takes seconds and must be completed."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in _STOP:
        signal.signal(number, signal.SIG_IGN)


def _stop(before: Callable[[], None], number: int, frame: Any) -> None:
    name = signal.Signals(number).name
    before()

    def again(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(name)

    # a library may swallow an exception in the middle of its imports: raise it every second until it is acknowledged
    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
    raise KeyboardInterrupt(name)
