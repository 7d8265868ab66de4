"""Host memory that the worker processes of a machine share."""

import os
from contextlib import suppress

from zi_experiments.runtime import distributed


def descriptors(sizes: list[int], ranks: int) -> list[int]:
    """Return a descriptor for each of these sizes in bytes, of memory that `ranks` consecutive ranks share: all call this.

    The memory has no name, and no limit but that of all memory, unlike /dev/shm in a container. It is freed with the last
    process that has it mapped.
    """
    first = distributed.rank() // ranks * ranks
    made = []
    if distributed.rank() == first:
        made = [os.memfd_create("slab", os.MFD_CLOEXEC) for _ in sizes]
        for descriptor, size in zip(made, sizes, strict=True):
            os.ftruncate(descriptor, size)
    process, theirs = distributed.from_all_ranks((os.getpid(), made))[first]
    try:
        found = made or [os.open(f"/proc/{process}/fd/{each}", os.O_RDWR | os.O_CLOEXEC) for each in theirs]
    except OSError as error:
        raise OSError(
            f"the memory of rank {first} cannot be shared ({error.strerror}): start the ranks of a machine in one container"
        ) from error
    distributed.barrier()  # the first rank may close its own from now on
    return found


def resident_bytes(process: int) -> int:
    """Return how much of such memory a process has mapped and touched; 0 if it has ended."""
    with suppress(OSError), open(f"/proc/{process}/status") as status:
        return next((1024 * int(line.split()[1]) for line in status if line.startswith("RssShmem:")), 0)
    return 0
