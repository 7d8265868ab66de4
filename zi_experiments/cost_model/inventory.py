"""Where a model's weights are stored between passes: as planned, and as an engine really holds them."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

MOST_NAMED = 3  # parameters named in a difference


class Home(Enum):
    """The memory where a parameter is stored between passes."""

    gpu = "gpu"
    cpu = "cpu"
    nvme = "nvme"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One parameter as it is stored, over all ranks."""

    numel: int  # 16-bit elements, without padding; if quantized, those of packed integers, scales and minima
    home: Home


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Bytes of weights that one rank holds, or all ranks in total."""

    gpu_bytes: int
    cpu_bytes: int
    nvme_bytes: int
    padding_bytes: int  # included above: padding and second copies


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """The weights that an engine holds on one rank after loading, found in its tensors and files."""

    parameters: dict[str, Stored]  # by name; tied parameters once
    held: Held


def home_on(device: Any) -> Home:
    """Return the memory of a torch device."""
    return Home.gpu if device.type == "cuda" else Home.cpu


def held(pieces: Iterable[tuple[Home, int]], parameter_bytes: int) -> Held:
    """Return the sum of tensors and files, given as (home, bytes); what exceeds `parameter_bytes` is padding."""
    total = dict.fromkeys(Home, 0)
    for home, nbytes in pieces:
        total[home] += nbytes
    return Held(
        gpu_bytes=total[Home.gpu],
        cpu_bytes=total[Home.cpu],
        nvme_bytes=total[Home.nvme],
        padding_bytes=sum(total.values()) - parameter_bytes,
    )


def total(ranks: list[Held]) -> Held:
    """Return the sum over all ranks."""
    return Held(**{field.name: sum(getattr(rank, field.name) for rank in ranks) for field in fields(Held)})


def difference(planned: dict[str, Stored], found: dict[str, Stored]) -> str | None:
    """Return one line on the parameters that are not stored as planned; None if all are."""
    names = [name for name in planned | found if planned.get(name) != found.get(name)]
    if not names:
        return None
    shown = [f"{name} ({_text(found.get(name))}; planned: {_text(planned.get(name))})" for name in names[:MOST_NAMED]]
    return f"{len(names)} of {len(planned)} parameters are not stored as planned: {', '.join(shown)}"


def _text(stored: Stored | None) -> str:
    return f"{stored.numel} elements in {stored.home.value}" if stored is not None else "not stored"
