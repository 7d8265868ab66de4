"""The processor cores near a GPU, from the kernel's files."""

import os
from contextlib import suppress
from pathlib import Path


def near(pci_address: str | None, sysfs: Path = Path("/sys")) -> tuple[int, ...]:
    """Return the cores of a GPU's NUMA node that this process may use; all that it may use if no node is known.

    The address is like "0000:3b:00.0", or as the driver writes it: longer, and in capitals.
    """
    allowed = sorted(os.sched_getaffinity(0))
    domain, _, rest = (pci_address or "").lower().partition(":")
    with suppress(OSError, ValueError):
        node = int((sysfs / f"bus/pci/devices/{domain[-4:]}:{rest}/numa_node").read_text())
        listed = _numbers((sysfs / f"devices/system/node/node{node}/cpulist").read_text())
        return tuple(core for core in allowed if core in listed) or tuple(allowed)
    return tuple(allowed)  # a virtual machine has node -1, which has no file


def _numbers(text: str) -> set[int]:
    """Return the numbers of a list such as "0-3,8"."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
