"""This machine is measured for real, once for all tests of this file, by the command that users have for it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import harmonic_mean

import cli
import psutil
import pytest
import torch
from places import HELPERS

from zi_experiments.calibration import cache, export, launch_overhead, suite
from zi_experiments.calibration.disk import bytes_per_s
from zi_experiments.config.schema import Calibration, ConfigError
from zi_experiments.engines import base
from zi_experiments.engines.disk_access import MOST_IN_FLIGHT
from zi_experiments.results import metrics
from zi_experiments.runtime.locks import FolderLock
from zi_experiments.system import machines
from zi_experiments.system.disk import Disk, mount_of

BLOCK_BYTES = 1 << 20


def command(*arguments, **variables):
    """`python -m zi_experiments.hardware` as it is typed, where no GPU is to be seen."""
    typed = [sys.executable, "-m", "zi_experiments.hardware", *map(str, arguments)]
    return typed, os.environ | {"CUDA_VISIBLE_DEVICES": ""} | {name: str(value) for name, value in variables.items()}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The command, carried out: what it said, and its folders."""
    folder = tmp_path_factory.mktemp("measured")
    typed, variables = command("--output", folder / "hardware" / "here.yaml", XDG_CACHE_HOME=folder / "cache")
    ran = subprocess.run(typed, env=variables, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return folder, ran.stdout


@pytest.fixture
def auto(compose_run):
    return compose_run("hardware=auto", "hardware.device=cpu").hardware


@pytest.fixture
def here(auto):
    """This machine, as far as it is known without a measurement."""
    return machines.detect(auto)


@pytest.fixture
def cached(done, monkeypatch, tmp_path):
    """The cache that the command has left, as one of the test's own; the file of this machine."""
    folder = tmp_path / "cache" / "zi_experiments" / "hardware"
    folder.mkdir(parents=True)
    [measured] = (done[0] / "cache" / "zi_experiments" / "hardware").iterdir()
    (folder / measured.name).write_bytes(measured.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder / measured.name


@pytest.fixture
def elsewhere(monkeypatch, tmp_path, machine):
    """A machine whose GPU is not here, so that only disks are measured, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return machine(gpus_visible=0)


@pytest.fixture
def on_disk(tmp_path):
    if mount_of(tmp_path).kind in ("tmpfs", "ramfs"):
        pytest.skip("temporary files are in memory here")
    (tmp_path / "disk").mkdir()
    return Disk(folders=(tmp_path / "disk",), block_bytes=BLOCK_BYTES, in_flight=4)


class Steps(launch_overhead.Overhead):
    """Steps of 4 and of 12 layers that are written down instead of measured."""

    def __init__(self, *steps_s):
        self._found = []
        self._written = list(steps_s)

    def _steps_s(self):
        return self._written.pop(0)


def test_what_a_layer_and_a_step_take_by_hand():
    """1 ms a layer and 1 ms a step at one moment, 2 and 4 ms at another."""
    steps = Steps([5e-3, 13e-3], [12e-3, 28e-3])
    steps.sample()
    steps.sample()

    assert steps.layer_and_step_s() == (pytest.approx(1.5e-3), pytest.approx(2.5e-3))


@pytest.mark.integration
def test_what_was_measured_is_possible(cached, auto, here):
    measured = suite.known(auto, here, None)
    rates, figures = measured.calibration.gemm_flops[here.dtypes[0]], measured.calibration

    assert measured.ceilings.source.startswith("measured on 2")
    assert list(figures.gemm_flops) == list(here.dtypes)
    assert measured.ceilings.flops >= max(rates.values())
    assert list(rates) == sorted(rates)
    # one row waits for memory, but on a processor without instructions for the type, which is measured for fewer rows
    assert rates[max(rates)] > (2 if 128 in rates else 0.4) * rates[1]
    # a weight is read once for a row
    assert 0.05 < rates[1] / measured.ceilings.hbm_bytes_per_s < 20
    assert 1e8 < figures.host_bytes_per_s <= measured.ceilings.hbm_bytes_per_s < 1e14
    assert 1e6 < figures.expand_elements_per_s < 1e13
    for seconds in (figures.layer_s, figures.step_s):
        assert seconds is None or 1e-6 < seconds < 1  # None: the machine was too busy
    assert measured.ceilings.link_bytes_per_s is None is figures.pin_bytes_per_s


def test_a_ceiling_is_the_best_of_several_moments(cached, auto, here):
    """Which are kept: they are its spread, and their mean is what a prediction takes."""
    measured = suite.known(auto, here, None)
    moments = measured.calibration.moments

    assert {name: len(rates) for name, rates in moments.items()} == dict.fromkeys(("hbm_bytes_per_s", *here.dtypes), 3)
    assert measured.ceilings.hbm_bytes_per_s >= max(moments["hbm_bytes_per_s"])
    assert measured.ceilings.flops >= max(max(moments[dtype]) for dtype in here.dtypes)
    assert measured.calibration.host_bytes_per_s == pytest.approx(harmonic_mean(moments["hbm_bytes_per_s"]))


@pytest.mark.integration
def test_a_bound_that_a_run_passes_is_measured_again(done, tmp_path):
    """The rates are those of a machine that was measured beside very much else."""
    command_line = cli.Cli(tmp_path)
    folder = tmp_path / "cache" / "zi_experiments" / "hardware"
    shutil.copytree(done[0] / "cache", tmp_path / "cache")
    [path] = folder.iterdir()
    products = {dtype: {"1": 1e6} for dtype in json.loads(path.read_text())["figures"]["gemm_flops"]}
    slow = {name: [1e6] for name in ("hbm_bytes_per_s", *products)}
    launches = {"layer_s": 1e-4, "step_s": 1e-3}  # of which a busy machine has none
    changed(path, hbm_bytes_per_s=1e6, flops=1e6, gemm_flops=products, moments=slow, **launches)

    ran = command_line.run(
        "hardware=cpu",
        "engine=stream",
        "offload=cpu",
        "quant=fp16",
        "tracking=none",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
    [record] = command_line.results()
    assert set(record["bound_passed"]) == {"prefill", "decode"}
    assert min(record["bound_passed"].values()) > 10
    assert "measuring this machine again" in ran.stdout
    assert re.search(
        r"faster than its lower bound \(prefill by \d+ % and decode by \d+ %\), so the bound was wrong",
        ran.stdout,
    )
    predicted, measured_s = record["plan"]["prediction"]["decode_step_s"], record["metrics"]["tpot_p50_s"]
    error = record["metrics"]["decode_prediction_error"]
    assert error == pytest.approx(predicted / measured_s - 1)
    assert error > 10, "the prediction is that of before the run"
    for name in ("fraction_of_bound", "prefill_fraction_of_bound"):
        assert record["metrics"][name] is None or record["metrics"][name] <= metrics.NOISE
    rates = record["plan"]["rates"]
    assert rates["hbm_bytes_per_s"] >= max(rates["calibration"]["moments"]["hbm_bytes_per_s"]) > 1e8
    kept = json.loads(path.read_text())["figures"]
    assert len(kept["moments"]["hbm_bytes_per_s"]) == 4, "the next run begins with them"
    assert kept["hbm_bytes_per_s"] == rates["hbm_bytes_per_s"]


def test_the_command_shows_every_figure(done, cached):
    figures = json.loads(cached.read_text())["figures"]

    assert "host memory" in done[1]
    assert f"{figures['host_bytes_per_s'] / 1e9:.4g} GB/s" in done[1]
    assert f"{figures['gemm_flops']['bfloat16']['1'] / 1e12:.4g} TFLOP/s" in done[1]
    assert set(figures) | {"source", "disk_bytes_per_s", "disk_write_bytes_per_s"} == {
        *export._HOW,
        "gemm_flops",
        "moments",
        "source",
    }


def changed(path, **figures):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"figures": content["figures"] | figures}))


def test_what_is_known_is_not_measured_again(cached, auto, here):
    changed(cached, layer_s=0.125)  # a measurement would find something else
    told = []

    measured = suite.ensure(auto, here, None, told.append)

    assert measured.calibration.layer_s == 0.125
    assert measured == suite.known(auto, here, None)
    assert told == []


def test_a_file_of_a_machine_counts_as_it_is(cached, compose_run, here):
    t4 = compose_run("hardware=t4").hardware

    assert suite.known(t4, here, None) is here
    assert suite.ensure(t4, here, None, pytest.fail) is here


def test_a_processor_asked_for_by_name_is_this_one(cached, compose_run, here):
    assert suite.known(compose_run("hardware=cpu").hardware, here, None).calibration is not None


@pytest.mark.parametrize("difference", [{"driver": "1"}, {"dtypes": ("float16",)}, {"gpu_name": "T4"}])
def test_another_machine_is_not_this_one(cached, auto, here, difference):
    assert suite.known(auto, here, None).calibration is not None
    assert suite.known(auto, replace(here, **difference), None).calibration is None


def test_another_format_is_not_ours(cached, auto, here, monkeypatch):
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)

    assert suite.known(auto, here, None).calibration is None


@pytest.mark.parametrize("figures", [{"flops": -1}, {"flops": "fast"}, {"speed": 1}, {"gemm_flops": {"bfloat16": 1}}])
def test_a_damaged_figure_counts_as_none(cached, auto, here, figures):
    changed(cached, **figures)

    assert suite.known(auto, here, None).calibration is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"identity": {}}', "\0"])
def test_a_damaged_file_counts_as_none(cached, auto, here, text):
    cached.write_text(text)

    assert suite.known(auto, here, None).calibration is None


def test_what_the_user_has_set_counts_before(cached, compose_run, here):
    asked = compose_run("hardware=auto", "hardware.device=cpu", "hardware.ceilings.flops=7e12").hardware
    nothing = dict.fromkeys(Calibration.__dataclass_fields__) | {"gemm_flops": {}}
    asked = replace(asked, calibration=Calibration(**nothing | {"step_s": 0.5}))
    published = replace(here, ceilings=replace(here.ceilings, link_bytes_per_s=5e9, hbm_bytes_per_s=6e9))

    measured = suite.known(asked, published, None)

    assert measured.ceilings.flops == 7e12
    assert measured.calibration.step_s == 0.5
    assert measured.ceilings.hbm_bytes_per_s not in (None, 6e9)
    assert list(measured.calibration.moments) == ["hbm_bytes_per_s"], "arithmetic is as typed, in each type"
    assert measured.calibration.gemm_flops
    assert measured.ceilings.link_bytes_per_s == 5e9  # nothing was measured


def test_a_disk_is_measured_around_the_cache_and_leaves_nothing(on_disk):
    made = replace(on_disk, folders=(on_disk.folders[0] / "yet" / "to be made",))

    reads, written, _ = bytes_per_s(made)

    assert len(reads) == 4
    assert all(1e6 < rate < 1e12 for rate in (*reads, written))
    assert list(on_disk.folders[0].iterdir()) == []


def test_a_file_of_a_given_size_is_written_and_read_through(on_disk, monkeypatch):
    """What was read a moment ago may come from a cache, and so may a small file."""
    seen = {"pwritev": [], "preadv": []}

    def watch(name):
        carry_out = getattr(os, name)

        def watched(descriptor, buffers, offset):
            seen[name].append(offset)
            return carry_out(descriptor, buffers, offset)

        monkeypatch.setattr(os, name, watched)

    watch("pwritev")
    watch("preadv")
    blocks = 4 * on_disk.in_flight

    bytes_per_s(on_disk, 0.0, blocks * BLOCK_BYTES)  # no time: each moment has one request of each buffer

    assert sorted(seen["pwritev"]) == sorted(seen["preadv"]) == [block * BLOCK_BYTES for block in range(blocks)]


def test_disks_are_measured_together(on_disk, tmp_path):
    """Each has an equal part, so both are as fast as the slowest; here they are one disk, which both share."""
    both = replace(on_disk, folders=(tmp_path / "a", tmp_path / "b"))
    for folder in both.folders:
        folder.mkdir()

    reads, written, notes = bytes_per_s(both, 0.4)

    assert len(reads) == 4
    assert all(1e6 < rate < 1e12 for rate in (*reads, written))
    assert all("reads" in note and str(tmp_path) in note for note in notes), "if one was slower"
    assert not any(list(folder.iterdir()) for folder in both.folders)
    with pytest.raises(OSError, match="/dev/shm is memory"):
        bytes_per_s(replace(on_disk, folders=(tmp_path, Path("/dev/shm"))), 0.4)


def test_a_disk_is_measured_once_for_its_settings(elsewhere, auto, on_disk):
    told = []

    first = suite.ensure(auto, elsewhere, on_disk, told.append)
    assert [line for line in told if "the disk of" in line] == told != []
    assert first == suite.ensure(auto, elsewhere, on_disk, pytest.fail)
    assert first == suite.known(auto, elsewhere, on_disk)
    assert suite.known(auto, elsewhere, replace(on_disk, in_flight=5)) == elsewhere

    assert first.ceilings.disk_bytes_per_s == max(first.calibration.moments["disk_bytes_per_s"]) > 1e6
    assert first.calibration.disk_write_bytes_per_s > 1e6
    assert first.ceilings.flops == elsewhere.ceilings.flops
    assert first.ceilings.source.startswith("by hand; disk measured on ")
    assert list(on_disk.folders[0].iterdir()) == []


def test_a_run_on_several_gpus_has_the_rates_of_links_that_are_busy_together(elsewhere, auto, compose_run):
    two = replace(elsewhere, gpus_visible=2, peer_bytes_per_s=450e9)
    alone = {"link_bytes_per_s": 55e9, "moments": {"link_bytes_per_s": [54e9, 55e9]}}
    together = {"link_bytes_per_s": 51e9, "peer_bytes_per_s": 240e9, "moments": {"link_bytes_per_s": [47e9, 51e9]}}
    cache.store(cache.of_machine(two), cache.Entry(measured_on="2026-11-27", figures=alone))
    cache.store(cache.of_links(two, 2), cache.Entry(measured_on="2026-11-27", figures=together))

    one, both = (suite.known(auto, two, None, gpus) for gpus in (1, 2))

    assert (one.ceilings.link_bytes_per_s, one.peer_bytes_per_s) == (55e9, 450e9)
    assert (both.ceilings.link_bytes_per_s, both.peer_bytes_per_s) == (51e9, 240e9)
    assert both.calibration.moments == {"link_bytes_per_s": [47e9, 51e9]}
    typed = compose_run("hardware=auto", "hardware.peer_bytes_per_s=1e9", "hardware.ceilings.link_bytes_per_s=2e9")
    asked = suite.known(typed.hardware, two, None, 2)
    assert (asked.ceilings.link_bytes_per_s, asked.peer_bytes_per_s) == (2e9, 1e9)
    here_one = suite.known(auto, replace(two, gpus_visible=1), None, 2)
    assert here_one.ceilings.link_bytes_per_s == 55e9, "each of two machines has one"


def test_memory_is_no_disk(elsewhere, auto):
    told = []

    measured = suite.ensure(
        auto, elsewhere, Disk(folders=(Path("/dev/shm"),), block_bytes=4096, in_flight=1), told.append
    )

    assert measured == elsewhere
    assert [line for line in told if "/dev/shm is memory" in line and line.startswith("warning: ")] == told[1:]
    assert not list(Path("/dev/shm").glob(".zi-*"))


def test_without_a_cache_a_machine_is_measured_and_told(elsewhere, auto, on_disk, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    told = []

    measured = suite.ensure(auto, elsewhere, on_disk, told.append)

    assert measured.ceilings.disk_bytes_per_s > 1e6
    assert "cannot be written" in told[-1]
    assert suite.known(auto, elsewhere, on_disk) == elsewhere


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_a_measurement_that_fails_is_told_in_one_line(elsewhere, auto):
    told = []

    measured = suite.ensure(auto, replace(elsewhere, gpus_visible=1), None, told.append)

    assert measured.calibration is None
    assert told[-1].startswith("warning: this machine was not measured: ")
    assert "\n" not in told[-1]
    assert list(cache.folder().iterdir()) == []


def test_a_plan_for_a_gpu_that_is_not_there_measures_nothing(elsewhere, auto):
    assert suite.ensure(auto, elsewhere, None, pytest.fail) == elsewhere


ASK = """
import json, sys
from pathlib import Path
sys.path.insert(0, str(Path({tests!r})))
from machines import MACHINES
from dataclasses import replace
from zi_experiments.config.composition import from_choices
from zi_experiments.calibration import suite
from zi_experiments.system.disk import Disk
where = Disk(folders=(Path({folder!r}),), block_bytes=1 << 20, in_flight=4)
told = lambda line: print(line, flush=True)
found = suite.ensure(
    from_choices({{"hardware": "auto"}}, {{}}).hardware, replace(MACHINES["h200"], gpus_visible=0), where, told
)
print(found.ceilings.disk_bytes_per_s)
"""


def test_two_at_once_measure_once(elsewhere, on_disk):
    cache.folder().mkdir(parents=True)
    lock = FolderLock(cache.folder())
    assert lock.acquire()
    code = ASK.format(tests=str(HELPERS), folder=str(on_disk.folders[0]))
    both = [cli.start(["-c", code], on_disk.folders[0], dict(os.environ)) for _ in range(2)]
    for process in both:
        cli.wait_for(process, "another process measures this machine: waiting")
    lock.release()
    said = [process.communicate()[0].splitlines() for process in both]

    assert sorted(map(len, said)) == [1, 2]  # only one has measured
    assert said[0][-1] == said[1][-1]
    assert float(said[0][-1]) > 1e6
    assert len(list(cache.folder().iterdir())) == 1


def measuring(process):
    """The processes below that measure."""
    found = []
    for child in psutil.Process(process).children(recursive=True):
        with suppress(psutil.Error):
            found += [child] if "--request" in child.cmdline() else []
    return found


def begun(process):
    """Wait for a process below that measures, and has loaded torch by now."""
    while True:
        for child in measuring(process):
            with suppress(OSError):
                if "libtorch" in Path(f"/proc/{child.pid}/maps").read_text():
                    return child
        time.sleep(0.02)


def test_a_killed_measurement_is_told_and_leaves_nothing(elsewhere, auto, here, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threading.Thread(target=lambda: begun(os.getpid()).kill(), daemon=True).start()
    told = []

    measured = suite.ensure(auto, here, None, told.append)

    assert measured == here
    assert told[1:] == ["warning: this machine was not measured: ended by SIGKILL"]
    assert measuring(os.getpid()) == []
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
    assert list(cache.folder().iterdir()) == []


def interrupted(tmp_path, number):
    """The command, ended by a signal while it measures; and the process that did so for it."""
    typed, variables = command(
        "--output", tmp_path / "hardware" / "x.yaml", XDG_CACHE_HOME=tmp_path / "cache", TMPDIR=tmp_path
    )
    launcher = cli.start(typed[1:], tmp_path, variables)
    child = begun(launcher.pid)
    launcher.send_signal(number)
    said, _ = launcher.communicate()
    return launcher.returncode, said, child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_all_that_it_has_started(tmp_path, number):
    code, said, child = interrupted(tmp_path, number)

    assert code == 130
    assert not child.is_running()
    assert "Traceback" not in said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert list(tmp_path.glob("*zi-*")) == []


def test_no_measurement_outlives_its_launcher(tmp_path):
    child = interrupted(tmp_path, signal.SIGKILL)[2]

    psutil.wait_procs([child], timeout=2)  # what it has only begun takes longer

    assert not child.is_running()


def plan(folder, name, *overrides):
    typed = ["--config-dir", str(folder), f"hardware={name}", "plan_only=true", *overrides]
    return cli.run(["-m", "zi_experiments", *typed], folder, dict(os.environ))


def test_what_the_command_writes_is_a_choice(done):
    folder, said = done

    assert said.endswith(f"python -m zi_experiments --config-dir {folder} hardware=here\n")
    ran = plan(folder, "here")

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "on cpu" in ran.stdout


def test_a_gpu_s_file_plans_where_there_is_none(cached, auto, here, machine, tmp_path):
    figures = replace(suite.known(auto, here, None).calibration, link_back_bytes_per_s=54321.5e6)
    (tmp_path / "hardware").mkdir()
    (tmp_path / "hardware" / "big.yaml").write_text(export.text(machine(calibration=figures), "big"))

    ran = plan(tmp_path, "big", "model=opt-1.3b")

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "float16 on cuda" in ran.stdout
    typed = ["--config-dir", str(tmp_path), "hardware=big", "--cfg", "job"]
    shown = cli.run(["-m", "zi_experiments", *typed], tmp_path, dict(os.environ)).stdout
    assert "gpu: NVIDIA H200" in shown
    assert "memory_gib: 139.6" in shown
    assert "link_back_bytes_per_s: 54320000000.0" in shown
    assert "dtypes:\n  - float16\n  - bfloat16" in shown


def test_a_file_goes_where_it_can(tmp_path, monkeypatch):
    shipped = tmp_path / "conf" / "hardware"
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "hardware" / "big.yaml"

    assert export.destination("big", None, shipped) == there  # nothing can be written to what is not there
    assert export.usage(there, shipped) == f"python -m zi_experiments --config-dir {tmp_path} hardware=big"
    shipped.mkdir(parents=True)
    assert export.destination("big", None, shipped) == shipped / "big.yaml"
    assert export.usage(shipped / "big.yaml", shipped) == "python -m zi_experiments hardware=big"


def test_only_its_own_files_are_written_again(cached, auto, here, tmp_path):
    shipped = tmp_path / "hardware"
    shipped.mkdir()
    (shipped / "big.yaml").write_text("name: big\n")
    with pytest.raises(ConfigError, match=r"big\.yaml exists already .*pass another --name"):
        export.destination("big", None, shipped)

    mine = shipped / "here.yaml"
    mine.write_text(export.text(suite.known(auto, here, None), "here"))
    assert export.destination("here", None, shipped) == mine


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--path", "/nowhere"], "--path /nowhere is no folder: mkdir -p /nowhere, or"),
        (["--output", "/tmp/x.yaml"], "pass --output FOLDER/hardware/x.yaml"),
        (["--name", "a", "--output", "/tmp/hardware/b.yaml"], "pass --output FOLDER/hardware/a.yaml"),
        (["--name", "a/b"], "hardware=a/b is not a valid choice"),
        (["--name", "cpu"], "cpu.yaml exists already"),
    ],
)
def test_bad_arguments_get_one_line(arguments, said, tmp_path):
    typed, variables = command(*arguments)

    ran = cli.run(typed[1:], tmp_path, variables)

    assert ran.returncode == 1
    assert ran.stderr.startswith("refused: ")
    assert said in ran.stderr
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("gpu", "name"),
    [("NVIDIA H200", "nvidia-h200"), ("Tesla T4", "tesla-t4"), ("NVIDIA RTX 6000 Ada", "nvidia-rtx-6000-ada")],
)
def test_a_choice_is_called_like_the_gpu(machine, gpu, name):
    assert export.default_name(machine(gpu_name=gpu)) == name


def test_a_run_says_how_it_reads(compose_run, tmp_path):
    stream = compose_run("offload=nvme", "engine=stream")
    deepspeed = compose_run("offload=nvme", "offload.aio.queue_depth=4", "offload.aio.intra_op_parallelism=2")
    blocks = compose_run("offload=nvme", "engine=stream", "offload.aio.block_size=268435456")

    def read(run):
        return base.get(run.engine.name).disk_access(run, [tmp_path])

    assert read(stream) == Disk(folders=(tmp_path,), block_bytes=8 << 20, in_flight=16)
    assert read(deepspeed).in_flight == 8
    assert read(compose_run("offload=nvme")).in_flight == MOST_IN_FLIGHT
    assert read(blocks).in_flight == 4  # buffers of 1 GiB together
