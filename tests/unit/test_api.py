import pytest

from zi_experiments import api, get_ds_model
from zi_experiments.config.schema import ConfigError

WHERE = {"cpu_offload": True, "disk_offload": False, "offload_dir": "", "dummy_weights": "random", "group_size": 64}


@pytest.mark.parametrize(
    ("name", "choice"),
    [("facebook/opt-66b", "opt-66b"), ("opt-66b", "opt-66b"), ("bigscience/bloom", "bloom-176b"), ("me/mine", "local")],
)
def test_a_shipped_shape_is_known_by_both_names(name, choice):
    assert api._known_model(name) == choice


def test_an_odd_number_of_bits_is_refused():
    with pytest.raises(ConfigError, match="pass bits=4, 8 or 16"):
        get_ds_model("opt-125m", bits=5, **WHERE)


def test_a_batch_that_the_ranks_cannot_share_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(ConfigError, match="cannot be divided among 2 ranks"):
        get_ds_model("opt-125m", bits=4, **WHERE)


def test_a_folder_on_disk_that_is_not_there_is_refused():
    where = WHERE | {"disk_offload": True, "offload_dir": "/nowhere/x"}

    with pytest.raises(ConfigError, match="offload_dir=/nowhere/x is no folder: mkdir -p /nowhere/x, or"):
        get_ds_model("opt-125m", bits=4, **where)


def test_a_profile_that_does_not_exist_is_refused():
    with pytest.raises(Exception, match="tuned, reference"):
        get_ds_model("opt-125m", bits=4, profile="fast", **WHERE)
