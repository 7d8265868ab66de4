"""W&B may be slow, stuck or broken: who reports progress to it goes on."""

import threading

from zi_experiments.runtime.latest import Latest
from zi_experiments.runtime.progress import Event

PATIENCE_S = 60  # of a test that fails


def event(phase, completed):
    return Event(phase, completed, 100, "tokens")


def test_the_beginning_of_a_phase_is_told_at_once():
    told, came = [], threading.Event()
    latest = Latest(lambda one: (told.append(one), came.set()))
    latest.put(event("load", 0))

    assert came.wait(PATIENCE_S)
    assert told == [event("load", 0)]
    latest.close(PATIENCE_S)
    assert told == [event("load", 0)], "and once"


def test_what_is_newer_takes_the_place_of_what_was_not_told():
    told, came, may_go = [], threading.Event(), threading.Event()

    def tell(one):
        came.set()
        may_go.wait(PATIENCE_S)
        told.append(one)

    latest = Latest(tell)
    latest.put(event("load", 0))
    assert came.wait(PATIENCE_S)
    for completed in range(50):
        latest.put(event("measure", completed))
    may_go.set()
    latest.close(PATIENCE_S)

    assert told == [event("load", 0), event("measure", 49)]


def test_nobody_waits_for_one_who_is_stuck():
    never = threading.Event()
    latest = Latest(lambda one: never.wait())
    for completed in range(1000):
        latest.put(event("measure", completed))
    latest.close(0.01)
    never.set()


def test_one_who_fails_is_told_again():
    told = []

    def tell(one):
        told.append(one)
        raise ConnectionError

    latest = Latest(tell)
    latest.put(event("load", 0))
    while not told:
        threading.Event().wait(0.001)
    latest.put(event("measure", 0))
    latest.close(PATIENCE_S)

    assert told == [event("load", 0), event("measure", 0)]
