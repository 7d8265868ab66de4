"""Measure in a separate process: the launcher survives whatever happens to it, and its own memory use does not change."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from zi_experiments import environment
from zi_experiments.calibration import disk
from zi_experiments.runtime import scratch, signals
from zi_experiments.system.disk import Disk

_LIMIT_S = 180.0  # a GPU that hangs must not block a run forever
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl


class MeasuringError(Exception):
    """The process gave no answer; the message says why, in one line."""


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of a new process to a request, `{"figures": …, "notes": […]}`; the process has ended by then.

    Raises `MeasuringError`. A `KeyboardInterrupt` passes through after the process is killed.
    """
    try:
        temporary = scratch.for_temporary_files(uuid.uuid4().hex[:12])
        held = scratch.Scratch(temporary)
    except OSError as error:
        raise MeasuringError(f"temporary files cannot be created: {error}") from error
    inherited = environment.worker_environment(cuda=request.get("device") == "cuda")
    try:
        with environment.variables(inherited | {"TMPDIR": str(temporary)}):
            return _carry_out(request)
    finally:
        held.close()


def _carry_out(request: dict[str, Any]) -> dict[str, Any]:
    argument = json.dumps(request | {"parent": os.getpid()})
    command = [sys.executable, "-m", "zi_experiments.hardware", "--request", argument]
    pipe = subprocess.PIPE
    # in its own process group Ctrl-C does not reach it, and its children can be killed with it
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, process_group=0) as process:
        try:
            out, err = process.communicate(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise MeasuringError(f"it took longer than {_LIMIT_S:.0f} s") from error
        except KeyboardInterrupt:
            signals.acknowledge()
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode < 0:
        raise MeasuringError(f"ended by {signal.Signals(-process.returncode).name}")
    if process.returncode:
        lines = err.decode(errors="replace").strip().splitlines()
        raise MeasuringError((lines or [f"exit code {process.returncode}"])[-1][:300])
    try:
        answered: dict[str, Any] = json.loads(out)
    except ValueError as error:
        raise MeasuringError("its answer cannot be parsed") from error
    return answered


def answer(text: str) -> None:
    """Measure what `text`, a request in JSON, asks for, and write the answer to stdout: the child's side of `ask`."""
    request = json.loads(text)
    _end_with(request["parent"])
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # output of libraries goes to stderr, not into the answer
        kinds = {"folders": _disk, "host_layer": _host_layer, "host_experts": _host_experts, "gpus": _links}
        measure = next((measure for key, measure in kinds.items() if key in request), _machine)
        json.dump(measure(request), out)


def _end_with(parent: int) -> None:
    """End this process when the launcher ends, for whatever reason, and let it be killed first when memory runs out."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:
        sys.exit("the launcher has ended")


def _disk(request: dict[str, Any]) -> dict[str, Any]:
    folders = tuple(map(Path, request["folders"]))
    where = Disk(folders=folders, block_bytes=request["block_bytes"], in_flight=request["in_flight"])
    try:
        reads, written, notes = disk.bytes_per_s(where)
    except OSError as error:
        sys.exit(str(error))
    moments = {"disk_bytes_per_s": reads}
    figures = {"disk_bytes_per_s": max(reads), "disk_write_bytes_per_s": written, "moments": moments}
    return {"figures": figures, "notes": notes}


def _machine(request: dict[str, Any]) -> dict[str, Any]:
    from zi_experiments.calibration import figures  # imports torch, which the launcher does not need for this

    measured, notes = figures.measure(request["device"], request["dtypes"])
    return {"figures": measured, "notes": notes}


def _links(request: dict[str, Any]) -> dict[str, Any]:
    from zi_experiments.calibration import links  # imports torch, as above

    measured, notes = links.measure(request["gpus"], peers=request["peers"])
    return {"figures": measured, "notes": notes}


def _host_layer(request: dict[str, Any]) -> dict[str, Any]:
    from zi_experiments.calibration import host_layer  # imports transformers, which the launcher does not need for this

    return {"figures": host_layer.measure(**request["host_layer"]), "notes": []}


def _host_experts(request: dict[str, Any]) -> dict[str, Any]:
    from zi_experiments.calibration import host_experts  # imports torch, which the launcher does not need for this

    return {"figures": host_experts.measure(**request["host_experts"]), "notes": []}
