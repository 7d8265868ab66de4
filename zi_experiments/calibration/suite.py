"""With `hardware=auto` or `cpu`: this machine measured once, and what was found laid under what the user has set."""

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
from zi_experiments.system.machines import Machine

Tell = Callable[[str], None]

MEASURED = ("auto", "cpu")  # choices that stand for this machine; the files of others have their own figures
_PATIENCE_S = 300.0  # with another process that measures, and may be stopped
_INTERVAL_S = 0.1


def known(hardware: Hardware, machine: Machine, disk: Disk | None) -> Machine:
    """The machine with what was measured of it before; with the figures of its file, for a `hardware` that has one."""
    if hardware.name not in MEASURED:
        return machine
    return _laid_under(hardware, machine, {one.kind: cache.load(one) for one in _subjects(machine, disk)})


def ensure(hardware: Hardware, machine: Machine, disk: Disk | None, tell: Tell) -> Machine:
    """The same, once what is missing has been measured.

    `tell` gets a line for what takes time, and a warning for what could not be measured, without which a run goes on. A
    `KeyboardInterrupt` passes through at once.
    """
    if hardware.name not in MEASURED:
        return machine
    subjects = _subjects(machine, disk)
    entries = {one.kind: cache.load(one) for one in subjects}
    missing = [one for one in subjects if entries[one.kind] is None and _is_there(one, machine)]
    if missing:
        with _turn(tell) as is_ours:
            for one in missing if is_ours else []:
                entries[one.kind] = cache.load(one) or _measured(one, tell)
    return _laid_under(hardware, machine, entries)


def measure(hardware: Hardware, machine: Machine, disk: Disk | None, tell: Tell) -> Machine:
    """The same, with all of it measured anew."""
    subjects = [one for one in _subjects(machine, disk) if _is_there(one, machine)]
    with _turn(tell) as is_ours:
        entries = {one.kind: _measured(one, tell) for one in subjects if is_ours}
    return _laid_under(hardware, machine, entries)


def again(hardware: Hardware, machine: Machine, disk: Disk | None, tell: Tell) -> Machine:
    """The same, with all of it measured anew since a run was faster than it can be: the best of before and now counts."""
    if hardware.name not in MEASURED:
        return machine
    subjects = [one for one in _subjects(machine, disk) if _is_there(one, machine)]
    before = {one.kind: cache.load(one) for one in subjects}
    entries = dict(before)
    with _turn(tell) as is_ours:
        for one in subjects if is_ours else []:
            entries[one.kind] = _measured(one, tell, before[one.kind]) or before[one.kind]
    return _laid_under(hardware, machine, entries)


def _subjects(machine: Machine, disk: Disk | None) -> list[Subject]:
    return [cache.of_machine(machine), *([cache.of_disk(disk, machine)] if disk is not None else [])]


def _is_there(subject: Subject, machine: Machine) -> bool:
    """Whether it can be measured: a plan for a GPU can be made without one."""
    return subject.kind == "disk" or machine.device == "cpu" or machine.gpus_visible > 0


@contextmanager
def _turn(tell: Tell) -> Iterator[bool]:
    """Wait until no other process measures, which would disturb both; whether that came to pass.

    Without locks, or a folder for them, nobody waits.
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
                tell("warning: it has not finished: this machine is not measured")
                return False
            time.sleep(_INTERVAL_S)
    except OSError:
        pass  # a filesystem without locks
    return True


def _measured(subject: Subject, tell: Tell, before: Entry | None = None) -> Entry | None:
    """What was measured now, with the best of `before`, and is kept where that can be; None: it failed."""
    what = "this machine" if subject.kind == "machine" else f"the disk of {subject.request['folder']}"
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
    """What was measured now, with the moments of before: ceilings are the best of all."""
    old, new = before.figures, now.figures
    moments = {name: [*old["moments"].get(name, []), *rates] for name, rates in new["moments"].items()}
    known = [field.name for field in fields(Ceilings) if old.get(field.name) and new.get(field.name)]
    best = {name: max(old[name], new[name]) for name in known}
    return replace(now, figures=new | best | {"moments": moments})


def _laid_under(hardware: Hardware, machine: Machine, entries: dict[str, Entry | None]) -> Machine:
    """What the user has set counts before what was measured, and that before what is published."""
    there = {kind: entry for kind, entry in entries.items() if entry is not None}
    if not there:
        return machine
    found: dict[str, Any] = _known(vars(machine.ceilings))
    moments: dict[str, list[float]] = {}
    for entry in there.values():
        found |= _known(entry.figures)
        moments |= entry.figures["moments"]
    found["source"] = _source(there, machine.ceilings.source)
    asked = _known(vars(hardware.ceilings))
    arithmetic = {*machine.dtypes} if "flops" in asked else set()
    found["moments"] = {name: rates for name, rates in moments.items() if name not in asked.keys() | arithmetic}
    found |= asked
    found |= _known(vars(hardware.calibration)) if hardware.calibration is not None else {}
    nothing: dict[str, Any] = {field.name: None for field in fields(Calibration)} | {"gemm_flops": {}}
    return replace(
        machine,
        ceilings=Ceilings(**{field.name: found.get(field.name) for field in fields(Ceilings)}),
        calibration=Calibration(**{name: found.get(name, missing) for name, missing in nothing.items()}),
    )


def _known(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if value is not None and value != {}}


def _source(entries: dict[str, Entry], published: str | None) -> str:
    if "machine" in entries:
        return f"measured on {entries['machine'].measured_on}"
    disk = f"disk measured on {entries['disk'].measured_on}"
    return f"{published}; {disk}" if published else disk
