"""The cores near a GPU, in planted trees of the kernel's files."""

import os

import pytest

from zi_experiments.system import cores

ADDRESS = "0000:3b:00.0"


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """`planted(node, cores)` → a tree with a GPU on that NUMA node; the process may use the cores 0 to 7."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))

    def planted(node, listed):
        device, memory = tmp_path / "bus/pci/devices" / ADDRESS, tmp_path / "devices/system/node/node1"
        device.mkdir(parents=True)
        memory.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")
        (memory / "cpulist").write_text(f"{listed}\n")
        return tmp_path

    return planted


@pytest.mark.parametrize(
    ("listed", "found"), [("4-7", (4, 5, 6, 7)), ("2,6-9", (2, 6, 7)), ("1", (1,)), ("16-31", tuple(range(8)))]
)
def test_cores_of_the_node_that_the_process_may_use(planted, listed, found):
    """All that it may use if it may use none of the node's."""
    assert cores.near(ADDRESS, planted(1, listed)) == found


@pytest.mark.parametrize("written", ["00000000:3B:00.0", "0000:3b:00.0"])
def test_addresses_as_the_driver_writes_them(planted, written):
    assert cores.near(written, planted(1, "4-5")) == (4, 5)


def test_without_a_node_all_cores_are_near(planted):
    """As in a virtual machine, or without a GPU."""
    tree = planted(-1, "4-5")

    assert cores.near(ADDRESS, tree) == cores.near("0000:99:00.0", tree) == cores.near(None, tree) == tuple(range(8))
