import pytest
from torch.utils import cpp_extension

from zi_experiments import preflight
from zi_experiments.config import ConfigError


@pytest.fixture
def problem(make_plan):
    """`problem(*overrides, on=machine, scratch=folder)` → the one line that refuses this plan."""

    def problem(*overrides, on, scratch=None):
        with pytest.raises(ConfigError) as refused:
            preflight.check(make_plan(*overrides, on=on), scratch)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    return problem


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


def test_a_missing_cuda_toolkit_is_refused_when_a_kernel_must_be_compiled(problem, machine, make_plan, monkeypatch):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    gpu = machine("h200", gpus_visible=1)

    assert "set CUDA_HOME" in problem("model=opt-125m", "quant=int4", on=gpu)
    preflight.check(make_plan("model=opt-125m", "quant=fp16", on=gpu), None)
    preflight.check(make_plan("model=opt-125m", "quant=int4", on=machine("cpu")), None)


def test_a_path_that_cannot_be_a_folder_is_refused(problem, machine, tmp_path):
    (tmp_path / "file").write_text("")

    message = problem("offload=nvme", on=machine("cpu"), scratch=tmp_path / "file" / "zi-1")

    assert f"offload.path={tmp_path / 'file'} cannot be written" in message


def test_a_disk_that_is_too_small_is_refused(problem, machine, tmp_path):
    host = machine("cpu", host_memory_bytes=1 << 50)

    message = problem(
        "model=opt-175b", "offload=nvme", "quant=fp16", *large(tmp_path), on=host, scratch=tmp_path / "zi-1"
    )

    assert "GB free and opt-175b needs" in message
    assert "quant=int4" in message


def large(folder):
    """Enough layers for this disk, whatever its size: a layer of OPT-175B takes 3.6 GB."""
    import shutil

    return [f"model.architecture.num_hidden_layers={shutil.disk_usage(folder).free // 3_000_000_000 + 10}"]


def test_the_scratch_folder_is_one_of_its_own(compose_run, tmp_path):
    named = compose_run("offload=nvme", f"offload.path={tmp_path}")

    assert preflight.scratch_folder(named, tmp_path / "default", "a") == tmp_path / "zi-a"
    assert (
        preflight.scratch_folder(compose_run("offload=nvme"), tmp_path / "default", "b")
        == tmp_path / "default" / "zi-b"
    )
    assert preflight.scratch_folder(compose_run("offload=cpu"), tmp_path, "c") is None
