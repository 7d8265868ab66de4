"""Links between the GPUs of this machine: how fast they are, as the driver says."""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from zi_experiments import environment

# of one link in one direction, by the version that NVML says: some drivers do not say the speed
_LINK_BYTES_PER_S = {1: 20e9, 2: 25e9, 3: 25e9, 4: 25e9, 5: 25e9, 6: 25e9, 7: 50e9}


def bytes_per_s(count: int) -> float | None:
    """Return the peak rate at which each of `count` visible GPUs receives from the others over NVLink.

    None where two of them have no such connection, or NVML does not say: they would use PCIe, as copies from the host do.
    NVML creates no CUDA context.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [_handle(name) for name in environment.visible_gpus(count)]
        if count < 2 or not all(_are_connected(one, other) for one, other in combinations(handles, 2)):
            return None
        return min(map(_received, handles)) or None
    except pynvml.NVMLError:
        return None


def _handle(name: str) -> Any:
    import pynvml

    return pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)


def _are_connected(one: Any, other: Any) -> bool:
    """Return whether NVLink connects two GPUs, directly or through a switch, which not all drivers count as direct."""
    import pynvml

    try:
        status = pynvml.nvmlDeviceGetP2PStatus(one, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except pynvml.NVMLError:
        status = None
    return status == pynvml.NVML_P2P_STATUS_OK or all(map(_has_switch, (one, other)))


def _has_switch(handle: Any) -> bool:
    import pynvml

    switch = pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
    return any(pynvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link) == switch for link in _links(handle))


def _links(handle: Any) -> Iterator[int]:
    """Yield the links of a GPU that work."""
    import pynvml

    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            if pynvml.nvmlDeviceGetNvLinkState(handle, link):
                yield link
        except pynvml.NVMLError:
            return  # the GPU has no more


def _received(handle: Any) -> float:
    """Return the bytes per second of all links of a GPU in one direction."""
    import pynvml

    return sum(_LINK_BYTES_PER_S.get(pynvml.nvmlDeviceGetNvLinkVersion(handle, link), 0.0) for link in _links(handle))
