"""Where a model's weights lie between passes: as planned, and as an engine holds them."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

MOST_NAMED = 3  # parameters that a difference names


class Home(Enum):
    """Where a parameter lives between passes."""

    gpu = "gpu"
    cpu = "cpu"
    nvme = "nvme"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One parameter as it is stored, over all ranks."""

    numel: int  # 16-bit elements: its own, or those of its packed integers, scales and minima; without padding
    home: Home


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Bytes of weights that one rank holds, or all ranks together."""

    gpu_bytes: int
    cpu_bytes: int
    nvme_bytes: int
    padding_bytes: int  # the part of them that is padding, or a second copy


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """What an engine holds of a loaded model on one rank, read off its tensors and files."""

    parameters: dict[str, Stored]  # by name; tied ones once
    held: Held


def home_on(device: Any) -> Home:
    """The memory of a torch device."""
    return Home.gpu if device.type == "cuda" else Home.cpu


def held(pieces: Iterable[tuple[Home, int]], parameter_bytes: int) -> Held:
    """The sum of tensors and files, given as (home, bytes), in which parameters take `parameter_bytes`."""
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
    """What all ranks hold together."""
    return Held(**{field.name: sum(getattr(rank, field.name) for rank in ranks) for field in fields(Held)})


def difference(planned: dict[str, Stored], found: dict[str, Stored]) -> str | None:
    """The parameters that are not stored as planned, in one line; None: all are."""
    names = [name for name in planned | found if planned.get(name) != found.get(name)]
    if not names:
        return None
    shown = [f"{name} ({_text(found.get(name))}; planned: {_text(planned.get(name))})" for name in names[:MOST_NAMED]]
    return f"{len(names)} of {len(planned)} parameters are not stored as planned: {', '.join(shown)}"


def _text(stored: Stored | None) -> str:
    return f"{stored.numel} elements in {stored.home.value}" if stored is not None else "not stored"
