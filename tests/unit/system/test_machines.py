import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zi_experiments.config.schema import Ceilings
from zi_experiments.system import machines, peers


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
    assert machines.is_gpu(name, model) is is_one


UNKNOWN = Ceilings(**dict.fromkeys(Ceilings.__dataclass_fields__))


def test_what_the_user_knows_of_a_gpu_counts_before_its_file():
    ceilings = machines._known_ceilings("NVIDIA H200", replace(UNKNOWN, link_bytes_per_s=55e9))

    assert ceilings.link_bytes_per_s == 55e9
    assert ceilings.flops == machines._known_ceilings("NVIDIA H200", UNKNOWN).flops


def test_a_known_gpu_has_the_ceilings_of_its_file():
    ceilings = machines._known_ceilings("NVIDIA H200", UNKNOWN)

    assert ceilings.link_bytes_per_s == 63e9
    assert "published" in ceilings.source
    assert machines._known_ceilings("NVIDIA L40S", UNKNOWN) is None


def test_this_machine_is_detected(compose_run):
    machine = machines.detect(compose_run("hardware=cpu").hardware)

    assert machine.device == "cpu"
    assert machine.gpu_memory_bytes is None
    assert 0 < machine.host_memory_bytes < 1 << 50
    assert "bfloat16" in machine.dtypes
    assert machines.detect(compose_run("hardware=auto").hardware).device == (
        "cuda" if torch.cuda.is_available() else "cpu"
    )


def test_a_memory_budget_replaces_what_was_detected(compose_run):
    run = compose_run("hardware=h200", "hardware.memory_gib=48", "hardware.host_memory_gib=100")

    machine = machines.detect(run.hardware)

    assert machine.gpu_memory_bytes == 48 << 30
    assert machine.host_memory_bytes == 100 << 30


MIB = 1 << 20
LOOK = """
import sys
from pathlib import Path
from zi_experiments.system import machines, peers
if len(sys.argv) > 1:
    Path(sys.argv[1]).write_bytes(bytes(int(sys.argv[2])))  # it stays in the file cache
print(machines.host_memory_available())
"""


@pytest.fixture
def group():
    """`group(limit, inner_limit)` → a control group for memory in one of its own, both removed at the end."""
    made = []

    def limited(folder, limit):
        folder.mkdir()
        made.append(folder)
        name = "memory.max" if (folder / "memory.max").exists() else "memory.limit_in_bytes"
        if limit is not None:
            (folder / name).write_text(str(limit))
        return folder

    def group(limit, inner_limit=None):
        try:
            return limited(limited(memory_group() / f"zi-test-{os.getpid()}", limit) / "inner", inner_limit)
        except OSError as error:
            pytest.skip(f"no control group for memory can be made here: {error}")

    yield group
    for folder in reversed(made):
        folder.rmdir()


def memory_group():
    """The group that this process is in: of version 1 where it is mounted, else of version 2."""
    paths = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    if "memory" in paths:
        return Path("/sys/fs/cgroup/memory", paths["memory"].lstrip("/"))
    folder = Path("/sys/fs/cgroup", paths.get("", "/").lstrip("/"))
    (folder / "cgroup.subtree_control").write_text("+memory")
    return folder


def seen_in(group, *arguments):
    """What a process in that group takes for available."""

    def enter():
        (group / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, "-c", LOOK, *map(str, arguments)]
    return int(subprocess.run(command, preexec_fn=enter, capture_output=True, text=True, check=True).stdout)


def test_the_limit_of_a_control_group_counts(group):
    assert 400 * MIB < seen_in(group(1024 * MIB, 512 * MIB)) <= 512 * MIB


def test_the_limit_of_a_control_group_above_counts(group):
    assert 400 * MIB < seen_in(group(512 * MIB)) <= 512 * MIB


def test_file_cache_that_a_control_group_can_do_without_is_available(group, tmp_path):
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True).stdout
    if "tmpfs" in kind:
        pytest.skip("files there are memory")
    inner = group(512 * MIB)

    assert seen_in(inner, tmp_path / "file", 300 * MIB) > 400 * MIB


def written(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)


@pytest.fixture
def container(tmp_path):
    """`container(group, root)` → a process as /proc shows it, with version 2 mounted in a folder of the test's."""
    top = tmp_path / "top"

    def container(group, root):
        mount = f"31 23 0:28 {root} {top} rw,relatime shared:9 - cgroup2 cgroup rw"
        written(
            tmp_path / "process", cgroup=f"0::{group}\n", mountinfo=f"{mount}\n23 1 8:1 / / rw - ext4 /dev/vda rw\n"
        )
        return tmp_path / "process"

    return container


STATISTICS = "anon 1\ninactive_file 50\nactive_file 7\n"


@pytest.mark.parametrize(
    ("group", "root"),
    [("/a/b", "/"), ("/docker/1/a/b", "/docker/1")],  # with a namespace for control groups, and without
)
def test_version_2_counts_every_group_above(container, tmp_path, group, root):
    top = tmp_path / "top"
    written(top, memory_current="900", memory_stat=STATISTICS)  # the root has no limit
    written(top / "a", memory_max="1000", memory_current="300", memory_stat=STATISTICS)
    written(top / "a" / "b", memory_max="max", memory_current="200", memory_stat=STATISTICS)

    assert machines.host_memory_available(container(group, root)) == 1000 - 300 + 50


def test_a_group_that_a_container_cannot_see_is_the_one_at_the_top(container, tmp_path):
    written(tmp_path / "top", memory_max="1000", memory_current="1100", memory_stat=STATISTICS)

    assert machines.host_memory_available(container("/docker/1", "/docker/2")) == 0


def test_without_control_groups_the_kernel_s_estimate_counts(tmp_path):
    assert machines.host_memory_available(tmp_path) > 1000


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        (["hardware=h100"], 450e9),
        (["hardware=t4"], None),
        (["hardware=t4", "hardware.peer_bytes_per_s=1e9"], 1e9),
        (["hardware=cpu"], None),
    ],
    ids=str,
)
def test_links_between_gpus_are_those_of_the_file_or_typed(compose_run, overrides, rate):
    assert machines.detect(compose_run(*overrides).hardware).peer_bytes_per_s == rate


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs, which may have links")
def test_without_a_driver_no_links_are_known():
    assert peers.bytes_per_s(2) is None
