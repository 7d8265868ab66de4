"""Variants of a run: each differs by an addition to its command line."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial, reduce

from zi_experiments.config.command_line import literal
from zi_experiments.config.composition import choose
from zi_experiments.config.schema import ConfigError, OffloadDevice, Run
from zi_experiments.config.validation import validate
from zi_experiments.engines import base

# from the smallest change of a run to the largest
CHOICES = (
    ("kv_cache", "cpu"),
    ("kv_cache", "gpu"),
    ("offload", "cpu"),
    ("quant", "int4"),
    ("offload", "nvme"),
    ("offload", "none"),
    ("engine", "stream"),
)
GPUS = (2, 4, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A variant of a run."""

    text: str  # the overrides to add
    run: Run


def one(run: Run, gpus_visible: int) -> Iterator[Change]:
    """Yield the variants of `run` that differ by one choice and are valid."""
    for group, choice in CHOICES:
        yield from _changed(run, _text(run, group, choice), partial(_choose, group=group, choice=choice))
    for count in GPUS:
        if run.hardware.num_gpus < count <= run.launch.nnodes * gpus_visible:
            yield from with_setting(run, "hardware.num_gpus", count)


def with_setting(run: Run, key: str, value: object) -> Iterator[Change]:
    """Yield the variant with a setting, given by its dotted name; nothing if it is invalid or changes nothing."""
    *groups, name = key.split(".")
    yield from _changed(
        run, f"{key}={literal(value)}", lambda copy: setattr(reduce(getattr, groups, copy), name, value)
    )


def _text(run: Run, group: str, choice: str) -> str:
    """Return a choice as typed. A folder for weights on disk would stay, and is refused with another target."""
    leaves_disk = group == "offload" and choice != "nvme" and run.offload.path is not None
    return f"{group}={choice}" + (" offload.path=null" if leaves_disk else "")


def _choose(run: Run, group: str, choice: str) -> None:
    choose(run, group, choice)
    if run.offload.device is not OffloadDevice.nvme:
        run.offload.path = None


def _changed(run: Run, text: str, apply: Callable[[Run], None]) -> Iterator[Change]:
    copy = deepcopy(run)
    try:
        apply(copy)
        validate(copy)
        base.check(copy)
    except ConfigError:
        return
    if copy != run:
        yield Change(text=text, run=copy)
