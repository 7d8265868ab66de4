import time

import pytest

from zi_experiments.runtime import energy
from zi_experiments.runtime.energy import Meter

SIZE_J = 1000  # of a counter, before it begins again


@pytest.fixture
def powercap(tmp_path):
    """A processor of two packages as Linux shows them: the first counts its memory and its cores too."""
    for zone, name in {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys",
        "intel-rapl-mmio:0": "package-0",
    }.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text(f"{SIZE_J * 10**6}\n")
        count(tmp_path, zone, 5)
    (tmp_path / "intel-rapl").mkdir()  # the kind of the zones, which has no name
    return tmp_path


def count(powercap, zone, joules):
    """Let a counter have this value, without a moment in which it has none."""
    (powercap / "new").write_text(f"{joules * 10**6}\n")
    (powercap / "new").rename(powercap / zone / "energy_uj")


def test_packages_and_their_memory_are_read(powercap):
    with Meter([], powercap) as meter:
        before = meter.read()
        count(powercap, "intel-rapl:0", 12)
        count(powercap, "intel-rapl:0:1", 8)
        count(powercap, "intel-rapl:1", 6)
        after = meter.read()

    assert {name: after[name] - before[name] for name in after} == {
        "cpu:package-0": 7.0,
        "dram:package-0": 3.0,
        "cpu:package-1": 1.0,
    }


def test_a_counter_may_begin_again(powercap):
    with Meter([], powercap) as meter:
        count(powercap, "intel-rapl:1", 990)
        before = meter.read()["cpu:package-1"]
        for joules in (20, 10):  # 30, and 990 more
            count(powercap, "intel-rapl:1", joules)
            after = meter.read()["cpu:package-1"]

    assert after - before == 30 + 990


def test_no_pass_is_long_enough_for_a_counter_to_begin_again_twice(powercap, monkeypatch):
    monkeypatch.setattr(energy, "_LOOK_S", 0.001)
    with Meter([], powercap) as meter:
        before = meter.read()["cpu:package-0"]
        for joules in (800, 600, 400):
            count(powercap, "intel-rapl:0", joules)
            while meter._domains["cpu:package-0"]._last != joules * 10**6:
                time.sleep(0.001)
        after = meter.read()["cpu:package-0"]

    assert after - before == 395 + 2 * SIZE_J


def test_what_cannot_be_read_is_unknown_and_not_zero(powercap):
    (powercap / "intel-rapl:0" / "energy_uj").unlink()
    (powercap / "intel-rapl:0:1" / "energy_uj").write_text("")
    with Meter(["GPU-00000000-0000-0000-0000-000000000000"], powercap) as meter:
        assert meter.read() == {
            "gpu:GPU-00000000-0000-0000-0000-000000000000": None,
            "cpu:package-0": None,
            "dram:package-0": None,
            "cpu:package-1": 0.0,
        }


def test_a_counter_that_fails_for_a_moment_stays_unknown(powercap):
    with Meter([], powercap) as meter:
        meter.read()
        (powercap / "intel-rapl:1" / "energy_uj").write_text("")
        meter.read()
        count(powercap, "intel-rapl:1", 9)
        assert meter.read()["cpu:package-1"] is None


def test_a_machine_without_counters(tmp_path):
    with Meter([], tmp_path / "not-there") as meter:
        assert meter.read() == {}
