"""What the tests share: runs composed from the real `conf/`, and machines written down by hand."""

import gc
import os
import re
import shutil
import signal
import subprocess
from dataclasses import replace
from functools import cache

import hydra
import pytest
from reliability import Page

from zi_experiments.config import schema
from zi_experiments.config.composition import to_run
from zi_experiments.config.schema import Calibration, Ceilings, ConfigError
from zi_experiments.engines import base
from zi_experiments.models import contents
from zi_experiments.planner import planning
from zi_experiments.system.machines import Machine

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; no test needs the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for tiny models threads only wait for one another

gc.set_threshold(10_000)  # as a run does

for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)  # under nohup, too, runs that tests stop should not ignore it

MACHINES = {
    "h200": Machine(
        device="cuda",
        gpu_name="NVIDIA H200",
        gpus_visible=8,
        gpu_memory_bytes=150_000_000_000,
        gpu_memory_is_capped=False,
        host_memory_bytes=2_000_000_000_000,
        disk_free_bytes=None,
        dtypes=("float16", "bfloat16"),
        ceilings=Ceilings(
            link_bytes_per_s=63e9,
            hbm_bytes_per_s=4.8e12,
            flops=989e12,
            disk_bytes_per_s=2.4e9,
            source="by hand",
        ),
        calibration=None,
        driver="580.00",
    ),
    "cpu": Machine(
        device="cpu",
        gpu_name=None,
        gpus_visible=0,
        gpu_memory_bytes=None,
        gpu_memory_is_capped=False,
        host_memory_bytes=2_000_000_000_000,
        disk_free_bytes=None,
        dtypes=("bfloat16",),
        ceilings=Ceilings(link_bytes_per_s=None, hbm_bytes_per_s=None, flops=None, disk_bytes_per_s=None, source=None),
        calibration=None,
        driver=None,
    ),
}


MACHINES["measured"] = replace(
    MACHINES["h200"],
    ceilings=Ceilings(
        link_bytes_per_s=50e9, hbm_bytes_per_s=4e12, flops=800e12, disk_bytes_per_s=5e9, source="by hand"
    ),
    calibration=Calibration(
        link_back_bytes_per_s=40e9,
        link_both_bytes_per_s=45e9,
        link_pageable_bytes_per_s=10e9,
        pin_bytes_per_s=4e9,
        host_bytes_per_s=20e9,
        disk_write_bytes_per_s=2e9,
        gemm_flops={name: {1: 2e12, 16: 32e12, 1024: 512e12} for name in ("float16", "bfloat16")},
        attention_flops=None,
        cache_bytes_per_s=None,
        expand_elements_per_s=1e12,
        layer_s=1e-4,
        step_s=2e-3,
        moments=None,
    ),
)

SLOWEST = ("test_sweep.py", "test_families.py", "test_documentation.py", "test_reliability.py", "test_verify.py")


def pytest_collection_modifyitems(items):
    """The files that take longest first, so that no process is left with one at the end."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden/ anew from what the code does now"
    )


@pytest.fixture(autouse=True)
def _started_by_no_launcher():
    """A session in this process makes it a rank; commands that later tests start are none."""
    yield
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def compose():
    """`compose(*overrides)` → the DictConfig that this command line would give."""
    schema.register()

    def compose(*overrides):
        with hydra.initialize_config_dir(config_dir=str(schema.conf_dir()), version_base="1.3"):
            return hydra.compose("config", overrides=list(overrides))

    return compose


@pytest.fixture(scope="session")
def compose_run(compose):
    """`compose_run(*overrides)` → the typed Run; a new one at each call."""
    composed = cache(compose)

    def compose_run(*overrides):
        run = to_run(composed(*overrides))
        base.check(run)
        return run

    return compose_run


@pytest.fixture(scope="session")
def machine():
    """`machine("h200", host_memory_bytes=…)` → a machine, changed where told: "h200", "measured", or "cpu"."""
    return lambda name="h200", **changes: replace(MACHINES[name], **changes)


@pytest.fixture(scope="session")
def describe():
    """`describe(run)` → its architecture; each model is built once, on the meta device."""
    known = {}

    def describe(run):
        key = repr((run.model, run.weights))
        if key not in known:
            known[key] = contents.load(run)
        return known[key]

    return describe


@pytest.fixture(scope="session")
def make_plan(compose_run, describe, machine):
    """`make_plan(*overrides, on=machine)` → the plan, without a look at the machine that runs the tests."""

    def make_plan(*overrides, on=None):
        run = compose_run(*overrides)
        return planning.build(run, describe(run), on or machine())

    return make_plan


@pytest.fixture
def refusal(make_plan):
    """`refusal(*overrides, on=machine)` → why this cannot be, after trying out each thing that it says to pass.

    Of what is no question of memory only the first, which may need the others.
    """

    def refusal(*overrides, on):
        with pytest.raises(ConfigError) as refused:
            make_plan(*overrides, on=on)
        message = str(refused.value)
        assert "\n" not in message
        ways = [re.findall(r"[\w.]+=[\w.-]+", way) for way in re.split(r",? or ", message.partition(": pass ")[2])]
        ways = [way for way in ways if way]
        assert ways, f"nothing to pass: {message}"
        for way in ways if " needs " in message else ways[:1]:
            make_plan(*overrides, *way, on=on)
        return message

    return refusal


@pytest.fixture(scope="session")
def plan_of(compose_run, describe, machine):
    """`plan_of(model, offload, quant, profile)` → the plan of one cell of that matrix, much faster than `make_plan`."""

    def plan_of(model, offload="cpu", quant="int4", profile="tuned", *, ranks=1, on=None):
        run = compose_run(f"model={model}", "workload=zero-inference", f"hardware.num_gpus={ranks}")
        run.offload = compose_run(f"offload={offload}").offload
        run.quant = compose_run(f"quant={quant}").quant
        run.engine = compose_run(f"engine.profile={profile}").engine
        return planning.build(run, describe(run), on or machine())

    return plan_of


@pytest.fixture
def small_disk(tmp_path):
    """An ext4 of its own, with room for the tiny models and not much more."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("there is no mkfs.ext4")
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(512 * (1 << 20))
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"nothing may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def page(pytestconfig):
    """docs/reliability.md."""
    return Page(update=pytestconfig.getoption("update_golden"))
