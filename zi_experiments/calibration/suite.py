"""With `hardware=auto` or `cpu`, measure this machine once; measured rates fill in what the user has not set."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import date
from typing import Any

from zi_experiments.calibration import cache, child
from zi_experiments.calibration.cache import Entry, Subject
from zi_experiments.config.schema import Calibration, Ceilings, Hardware
from zi_experiments.runtime.locks import FolderLock
from zi_experiments.system.disk import Disk
from zi_experiments.system.machines import HERE, Machine

Tell = Callable[[str], None]

_NAMES = {
    "machine": "this machine",
    "links": "the links of {gpus} GPUs together",
    "disk": "the disk of {folders}",
    "host-layer": "a decoder layer on the host's cores",
    "host-experts": "experts on the host's cores",
}

_PATIENCE_S = 300.0  # to wait for another process that measures; it may hang or be suspended
_INTERVAL_S = 0.1


def known(hardware: Hardware, machine: Machine, disk: Disk | None, gpus: int = 1) -> Machine:
    """Return `machine` with cached rates, without measuring; unchanged if its `hardware` file has its own rates.

    With several `gpus`, which a run uses on this machine, links have the rate of so many at the same time.
    """
    if hardware.name not in HERE:
        return machine
    return _laid_under(hardware, machine, {one.kind: cache.load(one) for one in _subjects(machine, disk, gpus)})


def ensure(hardware: Hardware, machine: Machine, disk: Disk | None, tell: Tell, gpus: int = 1) -> Machine:
    """Return `machine` with cached rates; measure and cache the missing ones.

    `tell` gets a line before something that takes time, and a warning for rates that could not be measured: the run goes on
    without them. A `KeyboardInterrupt` passes through at once.
    """
    if hardware.name not in HERE:
        return machine
    subjects = _subjects(machine, disk, gpus)
    entries = {one.kind: cache.load(one) for one in subjects}
    missing = [one for one in subjects if entries[one.kind] is None and _is_there(one, machine)]
    if missing:
        with _turn(tell) as is_ours:
            for one in missing if is_ours else []:
                entries[one.kind] = cache.load(one) or _measured(one, tell)
    return _laid_under(hardware, machine, entries)


def with_host(machine: Machine, kind: str, work: dict[str, Any], tell: Tell | None) -> Machine:
    """Return `machine` with how fast its cores compute; with `tell`, it is measured if it is not cached.

    `kind` and `work` are those of `cache.of_host`.
    """
    subject = cache.of_host(machine, kind, work)
    entry = cache.load(subject)
    if entry is None and tell is not None and _is_there(subject, machine):
        with _turn(tell) as is_ours:
            entry = (cache.load(subject) or _measured(subject, tell)) if is_ours else None
    if entry is None or machine.calibration is None:
        return machine
    return replace(machine, calibration=replace(machine.calibration, **_known(entry.figures)))


def measure(hardware: Hardware, machine: Machine, disk: Disk | None, tell: Tell, gpus: int = 1) -> Machine:
    """Return `machine` with all rates measured anew."""
    subjects = [one for one in _subjects(machine, disk, gpus) if _is_there(one, machine)]
    with _turn(tell) as is_ours:
        entries = {one.kind: _measured(one, tell) for one in subjects if is_ours}
    return _laid_under(hardware, machine, entries)


def again(hardware: Hardware, machine: Machine, disk: Disk | None, tell: Tell, gpus: int = 1) -> Machine:
    """Return `machine` with all rates measured again, because a run beat its bound: the best of old and new counts."""
    if hardware.name not in HERE:
        return machine
    subjects = [one for one in _subjects(machine, disk, gpus) if _is_there(one, machine)]
    before = {one.kind: cache.load(one) for one in subjects}
    entries = dict(before)
    with _turn(tell) as is_ours:
        for one in subjects if is_ours else []:
            entries[one.kind] = _measured(one, tell, before[one.kind]) or before[one.kind]
    return _laid_under(hardware, machine, entries)


def _subjects(machine: Machine, disk: Disk | None, gpus: int) -> list[Subject]:
    """Return what is measured; a figure of a later one counts."""
    links = [cache.of_links(machine, gpus)] if 1 < gpus <= machine.gpus_visible and machine.device == "cuda" else []
    return [cache.of_machine(machine), *links, *([cache.of_disk(disk, machine)] if disk is not None else [])]


def _is_there(subject: Subject, machine: Machine) -> bool:
    """Return whether the subject can be measured here: a run on a GPU can also be planned on a machine without one."""
    return subject.kind == "disk" or machine.device == "cpu" or machine.gpus_visible > 0


@contextmanager
def _turn(tell: Tell) -> Iterator[bool]:
    """Wait until no other process measures, since that would disturb both; the value is False after a timeout.

    Without locks, or a folder for them, there is no wait.
    """
    try:
        cache.folder().mkdir(parents=True, exist_ok=True)
        lock = FolderLock(cache.folder())
    except OSError:
        yield True
        return
    try:
        yield _acquired(lock, tell)
    finally:
        lock.release()


def _acquired(lock: FolderLock, tell: Tell) -> bool:
    until = time.monotonic() + _PATIENCE_S
    told = False
    try:
        while not lock.acquire():
            if not told:
                tell("another process measures this machine: waiting for it")
                told = True
            if time.monotonic() > until:
                tell("warning: the other process has not finished: this machine is not measured")
                return False
            time.sleep(_INTERVAL_S)
    except OSError:
        pass  # the filesystem has no locks
    return True


def _measured(subject: Subject, tell: Tell, before: Entry | None = None) -> Entry | None:
    """Return new measurements, combined with `before`, and cache them if possible; None if measuring failed."""
    asked = subject.request
    what = _NAMES[subject.kind].format(folders=" and ".join(asked.get("folders", [])), gpus=asked.get("gpus"))
    tell(f"measuring {what} {'again' if before else 'once'}: ten to twenty seconds")
    try:
        answer = child.ask(subject.request)
        entry = Entry(measured_on=date.today().isoformat(), figures=cache.checked(answer["figures"]))
        entry = _pooled(before, entry) if before else entry
    except (child.MeasuringError, ValueError) as error:
        tell(f"warning: {what} was not measured: {error}")
        return None
    for note in answer["notes"]:
        tell(f"warning: {note}")
    try:
        cache.store(subject, entry)
    except OSError as error:
        tell(f"warning: {cache.folder()} cannot be written ({error.strerror}): the next run measures again")
    return entry


def _pooled(before: Entry, now: Entry) -> Entry:
    """Return the new figures with the moments of both; ceilings are the best of both."""
    old, new = before.figures, now.figures
    moments = {name: [*old["moments"].get(name, []), *rates] for name, rates in new["moments"].items()}
    known = [field.name for field in fields(Ceilings) if old.get(field.name) and new.get(field.name)]
    best = {name: max(old[name], new[name]) for name in known}
    return replace(now, figures=new | best | {"moments": moments})


def _laid_under(hardware: Hardware, machine: Machine, entries: dict[str, Entry | None]) -> Machine:
    """Return `machine` with measured rates: values that the user set have priority, then measured, then published ones."""
    there = {kind: entry for kind, entry in entries.items() if entry is not None}
    if "machine" not in there:
        there.pop("links", None)  # of no use alone
    if not there:
        return machine
    found: dict[str, Any] = _known(vars(machine.ceilings))
    found |= _known(vars(machine.calibration)) if machine.calibration is not None else {}
    moments: dict[str, list[float]] = {}
    for entry in there.values():
        found |= _known(entry.figures)
        moments |= entry.figures["moments"]
    found["source"] = _source(there, machine.ceilings.source)
    typed = _known(vars(hardware.ceilings))
    arithmetic = {*machine.dtypes} if "flops" in typed else set()
    found["moments"] = {name: rates for name, rates in moments.items() if name not in typed.keys() | arithmetic}
    peer = hardware.peer_bytes_per_s or found.get("peer_bytes_per_s", machine.peer_bytes_per_s)
    found |= typed
    found |= _known(vars(hardware.calibration)) if hardware.calibration is not None else {}
    nothing: dict[str, Any] = {field.name: None for field in fields(Calibration)} | {"gemm_flops": {}}
    return replace(
        machine,
        ceilings=Ceilings(**{field.name: found.get(field.name) for field in fields(Ceilings)}),
        calibration=Calibration(**{name: found.get(name, missing) for name, missing in nothing.items()}),
        peer_bytes_per_s=peer,
    )


def _known(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if value is not None and value != {}}


def _source(entries: dict[str, Entry], published: str | None) -> str:
    if "machine" in entries:
        return f"measured on {entries['machine'].measured_on}"
    disk = f"disk measured on {entries['disk'].measured_on}"
    return f"{published}; {disk}" if published else disk
