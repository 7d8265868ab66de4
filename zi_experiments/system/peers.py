"""Links between the GPUs of this machine: how fast they are, as the driver says."""

from itertools import combinations
from typing import Any

from zi_experiments import environment


def bytes_per_s(count: int) -> float | None:
    """Return the peak rate at which each of `count` visible GPUs receives from the others over NVLink.

    None where two of them have no such connection, or NVML does not say: they would use PCIe, as copies from the host do.
    NVML creates no CUDA context.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [_handle(name) for name in environment.visible_gpus(count)]
        status = [
            pynvml.nvmlDeviceGetP2PStatus(one, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
            for one, other in combinations(handles, 2)
        ]
        if not status or any(each != pynvml.NVML_P2P_STATUS_OK for each in status):
            return None
        return min(map(_received, handles)) or None
    except pynvml.NVMLError:
        return None


def _handle(name: str) -> Any:
    import pynvml

    return pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)


def _received(handle: Any) -> float:
    """Return the bytes per second of all links of a GPU in one direction."""
    import pynvml

    (speed,) = pynvml.nvmlDeviceGetFieldValues(handle, [pynvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON])
    links = 0
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            links += pynvml.nvmlDeviceGetNvLinkState(handle, link)
        except pynvml.NVMLError:
            break  # the GPU has no more
    return 1e6 * links * float(speed.value.uiVal) if speed.nvmlReturn == pynvml.NVML_SUCCESS else 0.0
