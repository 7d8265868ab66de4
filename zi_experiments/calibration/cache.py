"""Cache of measured rates, with an entry for each machine or disk, by its identity."""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Any

from zi_experiments import environment, provenance
from zi_experiments.config.schema import Calibration, Ceilings
from zi_experiments.system.disk import Disk, existing, mount_of
from zi_experiments.system.machines import Machine

FORMAT = 10  # increased when a rate is measured differently, or the measured code becomes faster
_NAMES = {field.name for field in (*fields(Ceilings), *fields(Calibration))} - {"source"} | {"peer_bytes_per_s"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A machine, or a part of it, to measure."""

    kind: str  # "machine", "links", "disk", "host-layer" or "host-experts"
    identity: dict[str, Any]  # an entry is valid only if all of it is equal
    request: dict[str, Any]  # for the process that measures


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """Measured rates of a subject."""

    measured_on: str  # a date
    figures: dict[str, Any]  # by the names in `Ceilings`, `Calibration` and `Machine`


def folder() -> Path:
    return environment.cache_folder() / "hardware"


def of_machine(machine: Machine) -> Subject:
    """Return the subject of a machine: device, CPU and memory."""
    import torch

    around = provenance.describe(machine)
    kept = ("device", "gpu", "driver", "cpu", "cpu_cores", "host_memory_bytes", "python")
    identity = {key: around[key] for key in kept} | {
        "format": FORMAT,
        "dtypes": list(machine.dtypes),
        "threads": torch.get_num_threads(),
        **{name: around["packages"][name] for name in ("torch", "transformers")},
    }
    request = {"device": machine.device, "dtypes": list(machine.dtypes)}
    return Subject(kind="machine", identity=identity, request=request)


def of_links(machine: Machine, gpus: int) -> Subject:
    """Return the subject of the links of so many GPUs of that machine, which are busy at the same time."""
    peers = machine.peer_bytes_per_s is not None
    identity = of_machine(machine).identity | {"gpus": gpus, "peers": peers}
    return Subject(kind="links", identity=identity, request={"device": machine.device, "gpus": gpus, "peers": peers})


def of_disk(disk: Disk, machine: Machine) -> Subject:
    """Return the subject of disks of that machine, read together with the request size and count of `disk`."""
    around = provenance.describe(machine)
    there = [existing(folder) for folder in disk.folders]
    mounts = list(map(mount_of, there))
    settings = {"block_bytes": disk.block_bytes, "in_flight": disk.in_flight}
    identity = {key: around[key] for key in ("cpu", "host_memory_bytes")} | {
        "format": FORMAT,
        "disk": ", ".join(mount.device for mount in mounts),
        "mountpoint": ", ".join(mount.mountpoint for mount in mounts),
        **settings,
    }
    return Subject(kind="disk", identity=identity, request={"folders": list(map(str, there)), **settings})


def of_host(machine: Machine, kind: str, work: dict[str, Any]) -> Subject:
    """Return the subject of a decoder layer, or of experts, on that machine's cores.

    `kind` is "host-layer" or "host-experts"; `work` has the arguments of `measure` in the module of that name.
    """
    key = kind.replace("-", "_")
    identity = of_machine(machine).identity | {key: work}
    return Subject(kind=kind, identity=identity, request={"device": machine.device, key: work})


def load(subject: Subject) -> Entry | None:
    """Return the cached entry of a subject; None if there is none, or it is damaged."""
    try:
        content = json.loads(_path(subject).read_bytes())
        if content["identity"] != subject.identity:
            return None
        return Entry(measured_on=str(content["measured_on"]), figures=checked(content["figures"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def store(subject: Subject, entry: Entry) -> None:
    """Write an entry atomically. Raises `OSError` if it cannot be written."""
    path = _path(subject)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"identity": subject.identity, "measured_on": entry.measured_on, "figures": entry.figures}
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def checked(figures: dict[str, Any]) -> dict[str, Any]:
    """Return figures read from JSON, with keys and rates in their types. Raises an error, mostly `ValueError`, if invalid."""
    if not figures or figures.keys() - _NAMES:
        raise ValueError(f"unknown figures: {', '.join(figures)}")
    products = {
        dtype: {int(rows): _rate(rate) for rows, rate in rates.items()}
        for dtype, rates in figures.get("gemm_flops", {}).items()
    }
    moments = {name: [_rate(rate) for rate in rates] for name, rates in figures.get("moments", {}).items()}
    numbers = {name: value for name, value in figures.items() if name not in ("gemm_flops", "moments")}
    plain = {name: None if value is None else _rate(value) for name, value in numbers.items()}
    return plain | {"moments": moments} | ({"gemm_flops": products} if "gemm_flops" in figures else {})


def _rate(value: Any) -> float:
    if not 0 < value < inf:
        raise ValueError(f"{value} is not a positive finite number")
    return float(value)


def _path(subject: Subject) -> Path:
    digest = hashlib.sha256(json.dumps(subject.identity, sort_keys=True).encode()).hexdigest()
    return folder() / f"{subject.kind}-{digest[:16]}.json"
