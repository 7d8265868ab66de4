"""docs/reliability.md: one line for each fault that the tests cause, and a look at what a run has left behind."""

import os
import re
import shutil
import tempfile
import time
import uuid
import weakref
from contextlib import suppress
from pathlib import Path

import psutil
from cli import Cli
from places import DOCS

PAGE = DOCS / "reliability.md"
HEADER = """# Reliability

## Sweeps

- **One run never stops a sweep.** Out of memory, a killed worker, an abort in C++, an error, a hang (`launch.timeout_s`
  without a sign of progress): each is a record with its status, its cause and its log, and the next run begins. The
  sweep ends with a table.
- **The same command again goes on.** It runs only what is not `ok`: with the same settings, code, machine and weights,
  which the `fingerprint` in the record stands for. `force=true` runs everything again. A record that is replaced is
  kept beside the new one as `result-ID.json`.
- **Signals end a run within seconds.** Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 end the workers, remove weights
  from disk, close W&B and leave a `killed` record. What a `kill -9` leaves on disk, the next run removes. Ctrl-Z and
  `fg` cost nothing but time.
- **Several machines**: a worker, a launcher or a machine that is lost ends the run with a record, also if it is the first:
  [clusters.md](clusters.md).
- **Jobs in processes of their own** have GPUs of their own, or wait for their turn:
  [recipes.md](recipes.md#sweeps-in-several-processes).
- **The record is never lost.** `result.json` exists from the start and is replaced as a whole. If the disk is full at
  the end, the record is printed.
- **Checkpoints are not trusted.** They load from safetensors, or from `.bin` files that hold nothing but tensors.
  Python files that come with one run only with `trust_remote_code=true`. The record has the SHA-256 of what was loaded.

## Faults

The tests write this table (`make test-all ARGS="-n 0 tests/integration -k 'reliability or sweep or nodes' --update-golden"`)
and compare it with what they see. Each fault is caused for real, by signals, limits, full disks and damaged files. After it
the tests look for processes, shared memory, temporary files and weights on disk that nobody needs any more. The status is
that of the record, which every run leaves in its `result.json`. What is shown is the line on the console.

| fault | status | what is shown | what is left behind |
|---|---|---|---|
"""


class Faulty(Cli):
    """A command line whose processes and temporary files can be told from all others."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.marker = uuid.uuid4().hex
        self.temporary = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # a socket in it has a short name
        weakref.finalize(self, shutil.rmtree, self.temporary, ignore_errors=True)
        self.shared_before = abandoned_shared_memory()  # of others, who were there first

    def environment(self, **variables: str) -> dict[str, str]:
        return super().environment(ZI_TEST=self.marker, TMPDIR=str(self.temporary), **variables)

    def result(self) -> dict:
        (result,) = self.results()
        return result

    def processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if self._is_mine(process)]

    def _is_mine(self, process: psutil.Process) -> bool:
        """By its first variables, or by its folder: a forked process has those of the process that it was forked from."""
        try:
            return process.environ().get("ZI_TEST") == self.marker or Path(process.cwd()).is_relative_to(self.folder)
        except psutil.Error:
            return False

    def left(self, *more: Path) -> str:
        """What is left behind of all runs so far, in words, once they have had a minute to go."""
        end = time.monotonic() + 60
        found = self._found(more)
        while found and time.monotonic() < end:
            time.sleep(0.2)
            now = self._found(more)
            found = [what for what in found if what in now]  # what has come since is of other tests
        return ", ".join(found) or "nothing"

    def _found(self, more: tuple[Path, ...]) -> list[str]:
        found = [f"process {process.name()}" for process in self.processes() if process.status() != "zombie"]
        found += [
            f"temporary {path.name}" for path in self.temporary.iterdir() if not path.is_dir() or any(path.iterdir())
        ]
        weights = [path for base in (self.folder, *more) for path in base.rglob("zi-*") if path.is_dir()]
        found += ["weights" for path in weights if path.parent != self.temporary]
        found += [f"unfinished {path.name}" for path in self.folder.rglob(".result.json.*.tmp")]
        return found + [f"shared memory {name}" for name in sorted(abandoned_shared_memory() - self.shared_before)]


def abandoned_shared_memory() -> set[str]:
    """What of shared memory no process has mapped; other tests may run at the same time.

    Told by inodes: a semaphore is mapped under a name of its own by the process that makes it, which glibc removes.
    The folders of joblib, with which other tests run sweeps, are never mapped.
    """
    unmapped = {entry.inode(): entry.name for entry in os.scandir("/dev/shm") if not entry.name.startswith("joblib_")}
    for process in psutil.process_iter():
        with suppress(OSError):  # it has just ended
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                _, _, _, _, inode, *path = line.split(maxsplit=5)
                if path and path[0].startswith("/dev/shm/"):
                    unmapped.pop(int(inode), None)
    return set(unmapped.values())


def fill(folder: Path) -> None:
    """Leave no room on a disk, not for a byte."""
    with (folder / "somebody-else").open("wb", buffering=0) as file:
        block = b"x" * (1 << 20)
        while block:
            try:
                file.write(block)
            except OSError:
                block = block[: len(block) // 2]


def shown(text: str, folder: Path) -> str:
    """A line of the console without what differs from one run to the next."""
    text = text.replace(f"{folder}/", "").replace(str(folder), "…")
    text = re.sub(r"outputs/\d{4}-\d\d-\d\d/[\d.-]+-", "outputs/…-", text)
    text = re.sub(r"zi-[0-9a-f]{12}", "zi-…", text)
    return text.replace("|", "\\|").replace("\n", " ")


class Page:
    """The page, and whether it is being written."""

    def __init__(self, update: bool) -> None:
        self._update = update

    def check(self, fault: str, status: str, text: str, left: str) -> None:
        """One line of the page is this one."""
        line = f"| {fault} | {status} | {text} | {left} |"
        rows = self.rows()
        if self._update:
            rows[fault] = line
            PAGE.write_text(HEADER + "".join(f"{row}\n" for row in rows.values()))
        assert rows.get(fault) == line

    @staticmethod
    def rows() -> dict[str, str]:
        """The lines of the table by their faults."""
        lines = PAGE.read_text().splitlines() if PAGE.exists() else []
        table = [line for line in lines if line.startswith("| ") and not line.startswith("| fault ")]
        return {line.split(" | ")[0].removeprefix("| "): line for line in table}
