"""Peak use of host memory and disk during a run, sampled in the launcher so that it survives a crash of the workers."""

import threading
from pathlib import Path

import psutil

from zi_experiments.runtime import fork_server, shared_memory

_INTERVAL_S = 0.2


class Monitor:
    """Context manager that samples the memory of this process and all its descendants, and the size of folders.

    `host_peak_bytes` is the largest sum of resident set sizes, in which memory that workers share counts once, and
    `disk_peak_bytes` the largest size of the folders.
    """

    def __init__(self, folders: list[Path]) -> None:
        self._folders = folders
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self.host_peak_bytes = 0
        self.disk_peak_bytes = 0

    def __enter__(self) -> "Monitor":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(_INTERVAL_S):
            self.host_peak_bytes = max(self.host_peak_bytes, _resident_bytes())
            self.disk_peak_bytes = max(self.disk_peak_bytes, sum(map(_folder_bytes, self._folders)))


def _resident_bytes() -> int:
    this = psutil.Process()
    total = shared = 0
    for process in (this, *this.children(recursive=True)):
        if process.pid == fork_server.number():
            continue  # all that it has is this process's
        try:
            found = shared_memory.resident_bytes(process.pid)
            total += process.memory_info().rss - found
        except psutil.Error:
            continue  # just ended
        shared = max(shared, found)
    return total + shared


def _folder_bytes(folder: Path) -> int:
    sizes = {}  # by inode: a file may have several names
    for path in folder.rglob("*"):
        try:
            stat = path.stat()
        except OSError:
            continue  # just removed
        sizes[stat.st_ino] = stat.st_blocks * 512
    return sum(sizes.values())
