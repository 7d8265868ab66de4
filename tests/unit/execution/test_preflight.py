import json
import os
import shutil
import subprocess
import sys

import cli
import pytest
from torch.utils import cpp_extension

from zi_experiments import doctor, environment
from zi_experiments.config.schema import ConfigError
from zi_experiments.engines.deepspeed import ds_config, prerequisites
from zi_experiments.execution import preflight
from zi_experiments.system import machines, toolchain


@pytest.fixture
def problem(make_plan):
    """`problem(*overrides, on=machine, scratch=folder)` → the one line that refuses this plan."""

    def problem(*overrides, on, scratch=()):
        with pytest.raises(ConfigError) as refused:
            preflight.check(make_plan(*overrides, on=on), scratch)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    return problem


@pytest.fixture
def without_programs(monkeypatch, tmp_path):
    """No compiler is found, only what is beside python."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)


def test_a_gpu_that_is_not_there_is_refused(problem, machine):
    message = problem("hardware=h200", on=machine("h200", gpus_visible=0))

    assert "none is visible" in message
    assert "hardware=auto" in message


def test_more_gpus_than_there_are_are_refused(problem, machine):
    message = problem("hardware.num_gpus=4", "workload.batch_size=8", on=machine("h200", gpus_visible=2))

    assert "pass hardware.num_gpus=2" in message


def test_another_gpu_than_the_one_named_is_refused(problem, machine):
    message = problem("hardware=t4", on=machine("h200", gpus_visible=1))

    assert "hardware=t4" in message
    assert "NVIDIA H200" in message
    assert "hardware.memory_gib=15.0" in message


@pytest.mark.skipif("float16" in machines.cpu_dtypes(), reason="DeepSpeed computes float16 on this processor")
def test_float16_on_a_processor_is_refused_for_deepspeed_alone(problem, machine, make_plan):
    asked = machine("cpu", dtypes=("float16",))  # what hardware.dtypes=[float16] makes of it

    message = problem("hardware.dtypes=[float16]", on=asked)

    assert "hardware.dtypes=[float16]" in message
    assert "pass hardware.dtypes=null" in message
    for engine in ("stream", "accelerate", "fsdp"):
        preflight.check(make_plan(f"engine={engine}", "quant=fp16", "hardware.dtypes=[float16]", on=asked), [])


def test_a_missing_cuda_toolkit_is_refused_when_a_kernel_must_be_compiled(problem, machine, make_plan, monkeypatch):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    gpu = machine("h200", gpus_visible=1)

    assert "set CUDA_HOME" in problem("model=opt-125m", "quant=int4", on=gpu)
    assert "set CUDA_HOME" in problem("model=opt-125m", "quant=fp16", "offload=nvme", on=gpu)
    preflight.check(make_plan("model=opt-125m", "quant=fp16", on=gpu), [])
    preflight.check(make_plan("model=opt-125m", "quant=int4", on=machine("cpu")), [])


def test_a_list_of_architectures_that_deepspeed_cannot_read_is_refused(problem, machine, make_plan, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")

    message = problem("quant=int4", on=machine("h200", gpus_visible=1))

    assert "TORCH_CUDA_ARCH_LIST=9.0a" in message
    assert "unset TORCH_CUDA_ARCH_LIST" in message
    preflight.check(make_plan("quant=fp16", on=machine("h200", gpus_visible=1)), [])
    preflight.check(make_plan("quant=int4", on=machine("cpu")), [])


@pytest.mark.usefixtures("without_programs")
def test_a_missing_compiler_is_refused_where_something_is_compiled(problem, machine, make_plan):
    message = problem("quant=int4", on=machine("cpu"))

    assert "(ShareMemComm)" in message
    assert "c++ is not in PATH: apt-get install g++" in message
    assert "pass engine=stream" in message
    preflight.check(make_plan("quant=int4", "engine=stream", on=machine("cpu")), [])
    preflight.check(make_plan("quant=fp16", on=machine("h200", gpus_visible=1)), [])


@pytest.mark.usefixtures("without_programs")
def test_a_missing_c_compiler_is_refused_where_triton_needs_it(problem, machine, make_plan):
    gpu = machine("h200", gpus_visible=1)

    assert "gcc or clang is not in PATH: apt-get install gcc" in problem("quant=int4", "engine=stream", on=gpu)
    preflight.check(make_plan("quant=fp16", "engine=stream", on=gpu), [])


def test_libaio_that_does_not_compile_is_refused_with_what_the_compiler_says(problem, machine, monkeypatch, tmp_path):
    (tmp_path / "libaio.h").write_text("#error broken for a test\n")
    monkeypatch.setenv("CPATH", str(tmp_path))

    message = problem("offload=nvme", on=machine("cpu"), scratch=[tmp_path / "zi-1"])

    assert message.startswith("offload=nvme needs libaio's headers")
    assert "broken for a test" in message
    assert "apt-get install gcc libaio-dev" in message


def test_a_path_that_cannot_be_a_folder_is_refused(problem, machine, tmp_path):
    (tmp_path / "file").write_text("")

    message = problem("offload=nvme", on=machine("cpu"), scratch=[tmp_path / "file" / "zi-1"])

    assert f"offload.path={tmp_path / 'file'} cannot be written" in message


NVME = ("offload=nvme", "quant=fp16")


@pytest.mark.parametrize("profile", ["tuned", "reference"])
def test_a_buffer_smaller_than_a_weight_is_refused(problem, machine, make_plan, tmp_path, profile):
    largest, on = 50272 * 768, machine("cpu")  # the embedding of OPT-125M
    overrides = (*NVME, f"engine.profile={profile}", "offload.buffer_count=20", "offload.aio.block_size=1048576")

    message = problem(*overrides, f"offload.buffer_size={largest - 1}", on=on, scratch=[tmp_path / "zi-1"])

    assert f"pass offload.buffer_size={largest}" in message
    preflight.check(make_plan(*overrides, f"offload.buffer_size={largest}", on=on), [tmp_path / "zi-1"])


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        (["model=opt-125m"], 7),  # a layer's six matrices, and the embedding, which is the head too
        (["model=opt-125m", "+model.architecture.tie_word_embeddings=false"], 6),
        (["model=llama-2-7b"], 7),
        (["model=opt-125m", "engine.profile=reference", "offload.buffer_size=50000000"], 1),
        (["model=mixtral-8x7b", "engine.profile=reference"], 2),  # two stacks of experts are one module
    ],
)
def test_fewer_buffers_than_weights_in_use_are_refused(problem, machine, make_plan, tmp_path, overrides, needed):
    """Each of these figures is the smallest with which a model of that shape, but smaller, ran."""
    on, scratch = machine("cpu"), [tmp_path / "zi-1"]
    plan = make_plan(*NVME, *overrides, f"offload.buffer_count={needed}", on=on)

    assert list(prerequisites._buffers(plan)) == []
    if needed > 1:
        message = next(
            prerequisites._buffers(make_plan(*NVME, *overrides, f"offload.buffer_count={needed - 1}", on=on))
        )
        assert f"pass offload.buffer_count={needed}" in message
    if "model=opt-125m" in overrides:
        preflight.check(plan, scratch)


def test_blocks_that_overflow_in_deepspeed_are_refused(problem, machine, make_plan, tmp_path):
    on, scratch = machine("cpu"), [tmp_path / "zi-1"]
    overlap = "offload.aio.overlap_events=false"

    message = problem(*NVME, overlap, "offload.aio.queue_depth=2048", on=on, scratch=scratch)

    assert "pass offload.aio.queue_depth=2047" in message
    preflight.check(make_plan(*NVME, overlap, "offload.aio.queue_depth=2047", on=on), scratch)
    preflight.check(make_plan(*NVME, "offload.aio.queue_depth=2048", on=on), scratch)


def test_more_requests_than_the_kernel_has_are_refused(problem, machine, make_plan, tmp_path):
    left = toolchain.aio_requests_left()
    fits, on = left // 4, machine("cpu")
    overrides = (*NVME, "offload.aio.intra_op_parallelism=1", "offload.aio.block_size=1048576")

    message = problem(*overrides, f"offload.aio.queue_depth={fits + 100}", on=on, scratch=[tmp_path / "zi-1"])

    assert f"takes {4 * (fits + 100)} requests" in message
    suggested = int(message.split("pass offload.aio.queue_depth=")[1].split(",")[0])
    assert fits - 5000 < suggested <= fits + 5000  # other processes may come and go
    assert "or sysctl -w fs.aio-max-nr=" in message
    preflight.check(make_plan(*overrides, f"offload.aio.queue_depth={suggested - 5000}", on=on), [tmp_path / "zi-1"])


SETTINGS = (
    (),
    ("offload.aio.queue_depth=7",),
    ("offload.aio.intra_op_parallelism=3", "offload.aio.queue_depth=5"),
    ("engine.profile=reference",),
)
COUNT = """
import json, os, statistics, sys
from pathlib import Path
from zi_experiments.runtime import distributed
distributed.init("cpu")
import deepspeed, torch
from deepspeed.ops.op_builder.cpu import AsyncIOBuilder
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper as Swapper
deepspeed.init_distributed(auto_mpi_discovery=False)
AsyncIOBuilder().load(verbose=False)
taken = lambda: int(Path("/proc/sys/fs/aio-nr").read_text())
swappers = []
def count(config):
    before = taken()
    swappers.append(Swapper(config, torch.bfloat16))
    return taken() - before
for config in map(DeepSpeedConfig, json.loads(sys.argv[1])):
    # the figure is of all processes, of which others may begin or end just now
    print("takes", statistics.median(count(config) for _ in range(5)), flush=True)
os._exit(0)  # to end all those threads takes long
"""


def test_requests_are_those_that_deepspeed_takes_from_the_kernel(make_plan, machine, tmp_path):
    small = ("offload.buffer_count=1", "offload.buffer_size=1000000")
    plans = [make_plan(*NVME, *small, *settings, on=machine("cpu")) for settings in SETTINGS]
    configs = json.dumps([ds_config.build(plan, str(tmp_path / str(index))) for index, plan in enumerate(plans)])
    # with another ninja in PATH everything would be compiled again
    variables = dict(os.environ) | environment.worker_environment(cuda=False)

    done = cli.run(["-c", COUNT, configs], tmp_path, variables)

    assert done.returncode == 0, done.stderr
    counted = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("takes ")]
    assert counted == [1152, 126, 40, 256]
    assert counted == [
        prerequisites.aio_requests(plan, ds_config.build(plan, "")["aio"]["queue_depth"]) for plan in plans
    ]
    assert counted[0] == doctor.AIO_OF_A_RANK


def test_requests_are_reserved_by_every_rank(make_plan, machine):
    plan = make_plan(*NVME, "hardware.num_gpus=4", on=machine("h200"))
    direct = make_plan(*NVME, "offload.use_gds=true", on=machine("h200"))

    assert prerequisites.aio_requests(plan, 64) == 4 * 1152
    assert prerequisites.aio_requests(direct, 64) == 256, "GPUDirect Storage has threads of its own"


LIMITED = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "prlimit", f"--memlock={8 << 20}"]


def test_a_limit_on_locked_memory_counts_for_root_too(make_plan, machine, tmp_path):
    """A container's root may lack the capability. DeepSpeed then aborts: nullptr != pinned_buffer."""
    if shutil.which("setpriv") is None or subprocess.run([*LIMITED, "true"], capture_output=True).returncode:
        pytest.skip("capabilities cannot be dropped here")
    plan = make_plan(*NVME, on=machine("cpu"))
    locked = plan.storage.locked_bytes
    fixes = "print(*(toolchain.locked_memory(n).fix for n in ({}, {}, {})), sep='|')"
    look = f"from zi_experiments.system import toolchain; {fixes}"
    command = [*LIMITED, sys.executable, "-c", look.format(8 << 20, (8 << 20) + 1, locked)]

    fits, too_much, all_of_it = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("|")

    assert fits == "None"
    assert too_much.startswith("ulimit -l unlimited")
    assert all_of_it.startswith("ulimit -l unlimited")
