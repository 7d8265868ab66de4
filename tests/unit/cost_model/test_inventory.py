"""What an engine holds is compared with the plan, parameter by parameter, in every run."""

import families
import pytest

from zi_experiments.cost_model.inventory import Home, Stored, difference
from zi_experiments.engines import base
from zi_experiments.execution import worker

HEAD = Stored(numel=1024, home=Home.nvme)


def test_equal_inventories_differ_in_nothing():
    assert difference({"head": HEAD}, {"head": HEAD}) is None


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({}, "head (not stored; planned: 1024 elements in nvme)"),
        ({"head": Stored(numel=4096, home=Home.nvme)}, "head (4096 elements in nvme; planned: 1024 elements in nvme)"),
        ({"head": Stored(numel=1024, home=Home.cpu)}, "head (1024 elements in cpu; planned: 1024 elements in nvme)"),
        ({"head": HEAD, "copy": HEAD}, "copy (1024 elements in nvme; planned: not stored)"),
    ],
)
def test_a_difference_names_the_parameter(found, text):
    assert difference({"head": HEAD}, found) == f"1 of 1 parameters are not stored as planned: {text}"


@pytest.mark.parametrize(
    ("engine", "offload", "other"),
    [("stream", "nvme", "offload.resident=0.5"), ("accelerate", "nvme", "offload=cpu"), ("fsdp", "cpu", "quant=int4")],
)
def test_a_model_that_is_stored_otherwise_is_an_error(tmp_path, make_plan, engine, offload, other):
    """What an engine has loaded, against the plan of another run of the same model."""
    folder = tmp_path / "checkpoint"
    families.save_checkpoint(folder, "opt")
    plan, session = families.load(folder, "fp16", offload, engine=engine)
    try:
        assert worker.check_stored(plan, base.get(engine), session) == session.inventory().held
        local = ("model=local", f"model.path={folder}", "weights=pretrained", "engine=stream", f"offload={offload}")
        another = make_plan(*local, "quant=fp16", "hardware=cpu", other, on=plan.machine)
        with pytest.raises(RuntimeError, match=r"of \d+ parameters are not stored as planned: \S+ \(\d+ elements in "):
            worker.check_stored(another, base.get("stream"), session)
    finally:
        session.close()


@pytest.mark.parametrize("engine", ["accelerate", "stream"])
def test_bytes_on_disk_are_those_of_the_files(tmp_path, engine):
    folder = tmp_path / "checkpoint"
    families.save_checkpoint(folder, "opt")
    _, session = families.load(folder, "fp16", "nvme", engine=engine)
    files = [path.stat() for path in (tmp_path / "disk").iterdir() if path.suffix != ".json"]
    try:
        assert session.inventory().held.nvme_bytes == sum({file.st_ino: file.st_size for file in files}.values()) > 0
    finally:
        session.close()
