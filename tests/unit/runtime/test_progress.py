import io
import multiprocessing
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from zi_experiments.runtime import progress
from zi_experiments.runtime.progress import Display, Event, Progress, silent


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """Time stands still in the module under test, unless `clock.now` is changed."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture
def sent():
    return []


@pytest.fixture
def worker(clock, sent):
    return Progress(sent.append)


def test_a_phase_begins_and_ends(worker, sent):
    worker.begin("load", 100, "bytes")
    worker.end()

    assert sent == [Event("load", 0, 100, "bytes"), Event("load", 100, 100, "bytes", ended=True)]


def test_the_next_phase_ends_the_one_before(worker, sent):
    worker.begin("warm-up", 8, "tokens")
    worker.begin("measure", 24, "tokens")

    assert [(event.phase, event.ended) for event in sent] == [("warm-up", False), ("warm-up", True), ("measure", False)]


def test_ending_twice_says_so_once(worker, sent):
    worker.begin("load", 1, "bytes")
    worker.end()
    worker.end()

    assert len(sent) == 2


def test_events_are_at_most_ten_a_second(worker, sent, clock):
    worker.begin("measure", 1000, "tokens")
    for _ in range(500):
        clock.now += 0.01
        worker.advance()

    assert 40 <= len(sent) - 1 <= 50  # in five seconds


def test_an_event_carries_what_was_held_back(worker, sent, clock):
    worker.begin("measure", 10, "tokens")
    worker.advance(3)
    worker.advance(2)
    assert len(sent) == 1
    clock.now += 0.2
    worker.advance()

    assert sent[-1] == Event("measure", 6, 10, "tokens")


def test_begin_and_end_are_never_held_back(worker, sent):
    for phase in ("a", "b", "c"):
        worker.begin(phase, 1, "steps")
    worker.end()

    assert len(sent) == 6


def test_more_than_everything_is_everything(worker, sent, clock):
    worker.begin("load", 100, "bytes")
    clock.now += 1
    worker.advance(250)

    assert sent[-1] == Event("load", 100, 100, "bytes")


def test_silence_is_silent():
    quiet = silent()
    quiet.begin("load", 1, "bytes")
    quiet.advance()
    quiet.end()


class Script:
    """A channel that delivers events at given times."""

    def __init__(self, clock, *timed):
        self._clock = clock
        self._timed = list(timed)

    def poll(self, timeout):
        return bool(self._timed)

    def recv(self):
        at, event = self._timed.pop(0)
        self._clock.now = 1000.0 + at
        return event


def shown(clock, *timed, terminal=False):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with Display(Script(clock, *timed), console) as display:
        pass
    assert display.last == timed[-1][1]
    return console.file.getvalue()


def test_a_log_gets_a_line_at_the_beginning_and_one_at_the_end(clock):
    lines = shown(
        clock,
        (0, Event("load", 0, 26_000_000_000, "bytes")),
        (5, Event("load", 13_000_000_000, 26_000_000_000, "bytes")),
        (10, Event("load", 26_000_000_000, 26_000_000_000, "bytes", ended=True)),
    )

    assert lines.splitlines() == ["load: 26.0 GB", "load: done in 10.0 s"]


def test_a_long_phase_says_how_far_it_is_every_15_seconds(clock):
    lines = shown(
        clock,
        (0, Event("measure", 0, 96, "tokens")),
        (14, Event("measure", 20, 96, "tokens")),
        (16, Event("measure", 24, 96, "tokens")),
        (17, Event("measure", 25, 96, "tokens")),
        (32, Event("measure", 48, 96, "tokens")),
    )

    assert lines.splitlines() == [
        "measure: 96 tokens",
        "measure: 25 %, 1.5 tokens/s, 48 s left",
        "measure: 50 %, 1.5 tokens/s, 32 s left",
    ]


@pytest.mark.parametrize(
    ("completed", "unit", "rate"),
    [
        (2, "windows", "8.0 s per window"),
        (80, "tokens", "5.0 tokens/s"),
        (800, "tokens", "50 tokens/s"),
        (3_200_000_000, "bytes", "0.20 GB/s"),
    ],
)
def test_a_rate_is_in_what_moves(clock, completed, unit, rate):
    lines = shown(clock, (0, Event("do", 0, 10**11, unit)), (16, Event("do", completed, 10**11, unit)))

    assert lines.splitlines()[1].split(", ")[1] == rate


def test_before_the_first_step_there_is_no_rate(clock):
    lines = shown(clock, (0, Event("perplexity", 0, 9, "windows")), (16, Event("perplexity", 0, 9, "windows")))

    assert lines.splitlines()[1:] == ["perplexity: 16 s so far"]


def test_a_phase_of_one_step_says_how_long_it_has_taken(clock):
    lines = shown(
        clock,
        (0, Event("build async_io", 0, 1, "operator")),
        (16, Event("build async_io", 0, 1, "operator")),
        (32, Event("build async_io", 0, 1, "operator")),
    )

    assert lines.splitlines()[1:] == ["build async_io: 16 s so far", "build async_io: 32 s so far"]


def test_each_phase_is_timed_by_itself(clock):
    lines = shown(
        clock,
        (0, Event("warm-up", 0, 8, "tokens")),
        (3, Event("warm-up", 8, 8, "tokens", ended=True)),
        (4, Event("measure", 0, 24, "tokens")),
        (11, Event("measure", 24, 24, "tokens", ended=True)),
    )

    assert lines.splitlines()[1::2] == ["warm-up: done in 3.0 s", "measure: done in 7.0 s"]


def test_small_amounts_are_in_megabytes(clock):
    assert "load: 2.5 MB" in shown(clock, (0, Event("load", 0, 2_500_000, "bytes")))


def test_a_log_has_no_control_characters(clock):
    assert "\x1b" not in shown(clock, (0, Event("load", 0, 100, "bytes")), (1, Event("load", 100, 100, "bytes", True)))


def test_a_terminal_gets_a_bar_for_each_phase(clock):
    bars = shown(
        clock,
        (0, Event("load", 0, 100, "bytes")),
        (1, Event("load", 100, 100, "bytes", ended=True)),
        (2, Event("measure", 24, 24, "tokens", ended=True)),
        terminal=True,
    )

    assert "load" in bars
    assert "24/24" in bars


def test_a_display_without_events_closes(clock):
    display = Display(Script(clock), Console(file=io.StringIO()))
    with display:
        pass

    assert display.last is None


def talk(channel):
    worker = Progress(channel.send)
    while True:
        worker.begin("measure", 1000, "tokens")
        worker.end()


def test_a_writer_killed_while_it_talks_does_not_hold_the_launcher_up():
    context = multiprocessing.get_context("spawn")
    for _ in range(3):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=talk, args=(writer,))
        display = Display(reader, Console(file=io.StringIO()))
        with display:
            process.start()
            while display.last is None:
                time.sleep(0.01)
            process.kill()
            process.join()
            killed_at = time.monotonic()
        assert time.monotonic() - killed_at < 5


def test_a_phase_that_says_nothing_is_shown_to_go_on(monkeypatch):
    """As while an operator is compiled, which takes minutes."""
    monkeypatch.setattr(progress, "_LINE_INTERVAL_S", 0.2)
    reader, writer = multiprocessing.Pipe(duplex=False)
    file = io.StringIO()
    with Display(reader, Console(file=file)) as display:
        writer.send(Event("build async_io", 0, 1, "operator"))
        heard_at = display.heard_at
        until = time.monotonic() + 60
        while file.getvalue().count("so far") < 2 and time.monotonic() < until:
            time.sleep(0.05)
        writer.send(Event("build async_io", 1, 1, "operator", ended=True))
        time.sleep(0.5)

    lines = file.getvalue().splitlines()
    assert lines[0].startswith("build async_io: 1 operator")
    assert all("so far" in line for line in lines[1:-1])
    assert len(lines) >= 4
    assert "done in" in lines[-1], "and said once"
    assert display.heard_at > heard_at, "of the worker's own events"
