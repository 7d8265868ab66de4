"""What is said of workers that failed: of those that ran out of memory only what would change something."""

import json

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from zi_experiments.execution import failures


@pytest.fixture
def said(make_plan, tmp_path):
    """`said(error, *overrides)` → status, message and hint, from the file that a worker of OPT-13B leaves."""

    def said(error, *overrides):
        file = tmp_path / "error.json"
        file.write_text(
            json.dumps({"message": {"message": error, "extraInfo": {"py_callstack": "", "timestamp": "0"}}})
        )
        child = ChildFailedError("main", {0: ProcessFailure(0, 1, 1, str(file))})
        plan = make_plan("model=opt-13b", "engine=stream", *overrides)
        found = failures.of_worker(child, plan, "during load", False, tmp_path)
        return found.status, found.failure.message, found.failure.hint

    return said


@pytest.mark.parametrize(
    ("overrides", "fixes"),
    [
        (("offload=none", "quant=fp16"), "offload=cpu, kv_cache=cpu, quant=int4 or a smaller workload.batch_size"),
        (("offload=none", "quant=int4", "kv_cache=cpu"), "offload=cpu or a smaller workload.batch_size"),
        (("offload=cpu", "quant=int4", "kv_cache=cpu"), "a smaller workload.batch_size"),
        (
            ("offload=cpu", "quant=int4", "kv_cache=cpu", "offload.resident=0.6"),
            "offload.resident=0.3 or a smaller workload.batch_size",
        ),
    ],
    ids=str,
)
def test_out_of_gpu_memory(said, overrides, fixes):
    status, message, hint = said("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.", *overrides)

    assert (status, message) == ("oom", "the GPU ran out of memory (rank 0, during load)")
    assert hint == f"pass {fixes}"


@pytest.mark.parametrize(
    ("overrides", "fixes"),
    [
        (
            ("offload=cpu", "quant=fp16"),
            "offload=nvme, quant=int4, offload.pin_memory=false or a smaller hardware.host_memory_gib",
        ),
        (
            ("offload=nvme", "quant=int4", "offload.pin_memory=false"),
            "a smaller hardware.host_memory_gib",
        ),
    ],
    ids=str,
)
def test_out_of_host_memory(said, overrides, fixes):
    status, message, hint = said("MemoryError: ", *overrides)

    assert (status, message) == ("oom", "the host ran out of memory (rank 0, during load)")
    assert hint == f"pass {fixes}"


def test_what_a_worker_finds_wrong_with_what_was_asked_is_refused(said):
    status, message, hint = said("ConfigError: MASTER_PORT=1 is taken: set MASTER_PORT=2")

    assert (status, message, hint) == ("refused", "MASTER_PORT=1 is taken: set MASTER_PORT=2", None)


def test_of_a_stack_what_the_worker_called_is_shown(tmp_path):
    """A worker is forked: the frames below its entry point are the launcher's."""
    log = tmp_path / "run" / "attempt_0" / "0" / "stderr.log"
    log.parent.mkdir(parents=True)
    inside = ['  File "/a/timing.py", line 9 in measure_pass', '  File "/a/execution/worker.py", line 65 in main']
    callers = ['  File "/a/forkserver.py", line 274 in main', '  File "/a/cli.py", line 70 in main']
    log.write_text("\n".join(["a warning", "Current thread (most recent call first):", *inside, *callers, "the end"]))

    trace = failures.of_silence(5.0, "during measure", tmp_path).failure.traceback
    assert trace.splitlines() == ["a warning", "Current thread (most recent call first):", *inside, "the end"]
