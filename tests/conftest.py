"""What the tests share: runs composed from the real `conf/`, and machines written down by hand."""

import gc
import os
import re
import shutil
import signal
import subprocess
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import hydra
import hypothesis
import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from machines import MACHINES
from reliability import Page

from zi_experiments.config import resolvers, schema
from zi_experiments.config.composition import to_run
from zi_experiments.config.schema import ConfigError
from zi_experiments.engines import base
from zi_experiments.models import contents
from zi_experiments.planner import planning

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; no test needs the network
os.environ.pop("COLUMNS", None)  # a message is one line where no width is known
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for tiny models threads only wait for one another

gc.set_threshold(10_000)  # as a run does

for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)  # under nohup, too, runs that tests stop should not ignore it

TESTS = Path(__file__).parent
LEFT_OUT = "takes long: make test-all"
SLOWEST = (
    *("test_reliability.py", "test_sweep.py", "test_documentation.py", "test_calibration.py", "test_families.py"),
    *("test_run.py", "test_correctness.py", "test_malformed.py", "test_checkpoints.py", "test_report_page.py"),
)
EXAMPLES = {False: 150, True: 600}  # of a property, without and with --all


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also the tests marked `release`")
    parser.addoption("--update-golden", action="store_true", help="write pages and golden files anew")


def pytest_xdist_auto_num_workers():
    """One process more than there are cores: tests of whole commands wait for much of their time."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_configure(config):
    is_all = config.getoption("--all")
    hypothesis.settings.register_profile("tier", max_examples=EXAMPLES[is_all])
    hypothesis.settings.load_profile("tier")


def pytest_collection_modifyitems(config, items):
    """Each test has the name of its folder as a marker; the files that take longest come first."""
    for item in items:
        item.add_marker(item.path.relative_to(TESTS).parts[0])
        if item.get_closest_marker("release") and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason=LEFT_OUT))
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


def pytest_terminal_summary(terminalreporter):
    """What was left out."""
    left = sum(LEFT_OUT in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if left:
        terminalreporter.write_line(f"left out: {left} tests that make test-all runs")
    asked = [Path(path) for path in terminalreporter.config.args]
    if asked == [TESTS / "unit"]:
        terminalreporter.write_line("left out: tests/integration, tests/numerics and tests/docs, which make test runs")


@pytest.fixture(scope="session")
def every_test(pytestconfig):
    """Whether the tests marked `release` run too."""
    return pytestconfig.getoption("--all")


@pytest.fixture(autouse=True)
def _started_by_no_launcher():
    """A session in this process makes it a rank; commands that later tests start are none."""
    yield
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture(scope="module", autouse=True)
def _no_process_group_is_left():
    """A session in this process joins one, which would be another file's too."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def compose_anew():
    """`compose_anew(*overrides)` → the DictConfig that this command line would give."""
    resolvers.register()

    def compose_anew(*overrides):
        with hydra.initialize_config_dir(config_dir=str(schema.conf_dir()), version_base="1.3"):
            return hydra.compose("config", overrides=list(overrides))

    return compose_anew


@pytest.fixture(scope="session")
def compose(compose_anew):
    """`compose(*overrides)` → the same, thirty times as fast: each choice is composed once, and values are laid over them.

    By Hydra's own function, as it does after composing. Choices that may change others are composed together.
    """
    composed, parser = cache(compose_anew), OverridesParser.create()
    groups = {path.name for path in schema.conf_dir().iterdir() if path.is_dir()}

    def compose(*overrides):
        parsed = parser.parse_overrides(list(overrides))
        choices = [o for o in parsed if o.key_or_group in groups or o.is_hydra_override() or o.is_sweep_override()]
        lines = [choice.input_line for choice in choices]
        alone = all(re.fullmatch(r"(?!experiment|hydra)\w+=[\w.-]+", line) for line in lines)
        cfg = deepcopy(composed(*(() if alone else lines)))
        for choice in choices if alone else []:
            cfg[choice.key_or_group] = composed(choice.input_line)[choice.key_or_group]
        ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if o not in choices], cfg)
        return cfg

    return compose


@pytest.fixture(scope="session")
def compose_run(compose):
    """`compose_run(*overrides)` → the typed Run; a new one at each call."""

    def compose_run(*overrides):
        run = to_run(compose(*overrides))
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
def plan_of(make_plan):
    """`plan_of(model, offload, quant, profile)` → the plan of one cell of that matrix."""

    def plan_of(model, offload="cpu", quant="int4", profile="tuned", *, ranks=1, on=None):
        choices = (f"model={model}", f"offload={offload}", f"quant={quant}", "workload=zero-inference")
        return make_plan(*choices, f"engine.profile={profile}", f"hardware.num_gpus={ranks}", on=on)

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
