"""Energy counters of GPUs (NVML) and processors (RAPL): joules, read between passes by one process of a run."""

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

POWERCAP = "/sys/class/powercap"
_LOOK_S = 30.0  # a processor's counter begins again from zero after two minutes at 2 kW, the fastest that there is

Reading = dict[str, float | None]  # joules by counter since some moment; None: it cannot be read


class Meter:
    """Context manager around the counters of a run: `gpu:UUID`, and of the whole host `cpu:package-N` and `dram:package-N`.

    A package's energy has no part of that of its memory, which not every processor counts.
    """

    def __init__(self, gpus: list[str], powercap: str | Path = POWERCAP, processors: bool = True) -> None:
        self._gpus = {f"gpu:{uuid}": _gpu(uuid) for uuid in gpus}
        self._domains = _domains(Path(powercap)) if processors else {}
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="energy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def read(self) -> Reading:
        """Return the joules of all counters. A difference of two readings is the energy between them."""
        with self._lock:
            hosts = {name: domain.read() for name, domain in self._domains.items()}
        return {name: _gpu_joules(handle) for name, handle in self._gpus.items()} | hosts

    def _follow(self) -> None:
        """Read the processor's counters before they can begin again twice."""
        while not self._done.wait(_LOOK_S):
            with self._lock:
                for domain in self._domains.values():
                    domain.read()


class _Domain:
    """A counter of RAPL, without its fresh starts from zero."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._joules: float | None = 0.0
        self._last: int | None = None

    def read(self) -> float | None:
        """Return the joules since the first reading; None from the first failure on."""
        try:
            now = int((self._folder / "energy_uj").read_text())
            size = int((self._folder / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            self._joules = None  # most systems let only root read it
        if self._joules is not None:
            since = now if self._last is None else self._last
            self._joules += (now - since + (size if now < since else 0)) / 1e6
            self._last = now
        return self._joules


def _domains(powercap: Path) -> dict[str, _Domain]:
    """Return the counters of packages and of their memory. Other parts of a package are in its own counter."""
    found = {}
    for folder in sorted(powercap.glob("intel-rapl:*")):  # AMD's have this name as well
        with suppress(OSError):
            name = _name(folder)
            if name.startswith("package"):
                found[f"cpu:{name}"] = _Domain(folder)
            elif name == "dram":
                package = folder.with_name(folder.name.rpartition(":")[0])
                found[f"dram:{_name(package)}"] = _Domain(folder)
    return found


def _name(folder: Path) -> str:
    return (folder / "name").read_text().strip()


def visible_gpus(count: int) -> list[str]:
    """Return the UUIDs, as NVML has them, of the first `count` GPUs that CUDA shows this process."""
    import torch

    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(count)]


def _gpu(uuid: str) -> Any:
    """Return NVML's handle of a GPU; None where NVML is missing, or does not know it, as a part of a GPU (MIG)."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:
        return None


def _gpu_joules(handle: Any) -> float | None:
    """Return the joules since the driver was loaded; None where the GPU has no such counter."""
    import pynvml

    if handle is None:
        return None
    try:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
    except pynvml.NVMLError:
        return None
