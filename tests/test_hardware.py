from dataclasses import replace

import pytest
import torch

from zi_experiments import hardware
from zi_experiments.config import Ceilings


@pytest.mark.parametrize(
    ("name", "model", "is_one"),
    [
        ("NVIDIA H200", "H200", True),
        ("NVIDIA H200 NVL", "H200", True),
        ("NVIDIA GH200 480GB", "H200", False),
        ("NVIDIA L4", "NVIDIA L4", True),
        ("NVIDIA L40S", "NVIDIA L4", False),
        ("Tesla T4", "T4", True),
        ("NVIDIA T400 4GB", "T4", False),
        (None, "T4", False),
    ],
)
def test_a_gpu_is_known_by_whole_words(name, model, is_one):
    assert hardware.is_gpu(name, model) is is_one


UNKNOWN = Ceilings(link_bytes_per_s=None, hbm_bytes_per_s=None, flops=None, disk_bytes_per_s=None, source=None)


def test_what_the_user_knows_of_a_gpu_counts_before_its_file():
    ceilings = hardware._known_ceilings("NVIDIA H200", replace(UNKNOWN, link_bytes_per_s=55e9))

    assert ceilings.link_bytes_per_s == 55e9
    assert ceilings.flops == hardware._known_ceilings("NVIDIA H200", UNKNOWN).flops


def test_a_known_gpu_has_the_ceilings_of_its_file():
    ceilings = hardware._known_ceilings("NVIDIA H200", UNKNOWN)

    assert ceilings.link_bytes_per_s == 63e9
    assert "published" in ceilings.source
    assert hardware._known_ceilings("NVIDIA L40S", UNKNOWN) is None


def test_this_machine_is_detected(compose_run):
    machine = hardware.detect(compose_run("hardware=cpu").hardware)

    assert machine.device == "cpu"
    assert machine.gpu_memory_bytes is None
    assert 0 < machine.host_memory_bytes < 1 << 50
    assert "bfloat16" in machine.dtypes
    assert hardware.detect(compose_run("hardware=auto").hardware).device == (
        "cuda" if torch.cuda.is_available() else "cpu"
    )


def test_a_memory_budget_replaces_what_was_detected(compose_run):
    run = compose_run("hardware=h200", "hardware.memory_gib=48", "hardware.host_memory_gib=100")

    machine = hardware.detect(run.hardware)

    assert machine.gpu_memory_bytes == 48 << 30
    assert machine.host_memory_bytes == 100 << 30
