"""Another run near a run is the one that Hydra would compose from its command line with one more override."""

from copy import deepcopy
from itertools import product

import pytest
from omegaconf import OmegaConf

from zi_experiments.config import schema
from zi_experiments.config.composition import choose
from zi_experiments.config.schema import ConfigError, conf_dir
from zi_experiments.config.validation import validate
from zi_experiments.planner import alternatives

# what a user may have set in a group beside its choice; some go with some choices only
SETTINGS = {
    "offload": ((), ("offload.pin_memory=true",), ("offload.path=/mnt/x", "offload.aio.queue_depth=7")),
    "quant": ((), ("quant.group_size=48",), ("quant.group_dim=0",)),
    "kv_cache": ((),),
    "engine": ((), ("engine.profile=reference",)),
}
CASES = [
    (group, *pair, settings)
    for group, kinds in SETTINGS.items()
    for pair in product(sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")), repeat=2)
    for settings in kinds
]


def validated(make):
    """The run, or why it cannot be."""
    try:
        run = make()
        validate(run)
    except ConfigError as error:
        return str(error)
    return run


@pytest.fixture
def raw(compose):
    """`raw(*overrides)` → the run, which may not go together."""
    return lambda *overrides: OmegaConf.to_object(compose(*overrides))


@pytest.mark.parametrize(("group", "before", "after", "settings"), CASES, ids=str)
def test_a_choice_made_differently_is_what_hydra_composes(raw, group, before, after, settings):
    run, expected = raw(f"{group}={before}", *settings), raw(f"{group}={after}", *settings)

    choose(run, group, after)

    assert getattr(run, group) == getattr(expected, group)
    run.name = expected.name  # which is made of the choices
    assert run == expected
    assert validated(lambda: run) == validated(lambda: expected)


def test_hydra_takes_the_last_of_two_choices(compose_run):
    """So that an override can be added to the end of a command line."""
    assert compose_run("offload=cpu", "offload.pin_memory=true", "offload=none", "offload.pin_memory=null") == (
        compose_run("offload=none")
    )


def test_a_choice_of_the_user_s_own_is_replaced_as_a_whole(compose_run):
    """Nobody knows which of its values were meant, so that they all go with it."""
    run = compose_run("quant=int8", "quant.name=mine", "quant.group_size=32")
    choose(run, "quant", "int4")

    assert run.quant == compose_run("quant=int4").quant


def texts(run, gpus_visible=1):
    return [change.text for change in alternatives.one(run, gpus_visible)]


def test_changes_from_the_nearest_to_the_farthest(compose_run):
    assert texts(compose_run("offload=none", "quant=fp16")) == [
        "kv_cache=cpu",
        "offload=cpu",
        "quant=int4",
        "offload=nvme",
        "engine=stream",
    ]


def test_what_is_chosen_already_is_no_change(compose_run):
    assert texts(compose_run("offload=cpu", "quant=int4", "kv_cache=cpu", "engine=stream")) == [
        "kv_cache=gpu",
        "offload=nvme",
        "offload=none",
    ]


def test_what_the_configuration_does_not_allow_is_no_change(compose_run):
    """The settings of a disk's requests mean nothing without a disk."""
    found = texts(compose_run("offload=nvme", "offload.aio.queue_depth=7", "quant=int4"))

    assert not {"offload=cpu", "offload=none"} & set(found)
    assert "kv_cache=cpu" in found


def test_a_folder_for_weights_is_taken_back_with_the_disk(compose_run):
    """It is no reason to offer nothing but another disk."""
    typed = ("offload=nvme", "offload.path=/mnt/x", "quant=int4")
    found = {change.text: change.run for change in alternatives.one(compose_run(*typed), 1)}

    for text in ("offload=cpu offload.path=null", "offload=none offload.path=null"):
        assert found[text].offload == compose_run(*typed, *text.split()).offload


@pytest.mark.parametrize(
    ("ranks", "visible", "advised"), [(1, 1, []), (1, 2, [2]), (1, 8, [2, 4, 8]), (2, 4, [4]), (8, 8, []), (1, 3, [2])]
)
def test_more_gpus_as_far_as_there_are_more(compose_run, ranks, visible, advised):
    run = compose_run(f"hardware.num_gpus={ranks}", "workload.batch_size=8")
    found = [text for text in texts(run, visible) if text.startswith("hardware")]

    assert found == [f"hardware.num_gpus={count}" for count in advised]


def test_ranks_that_cannot_share_the_batch_are_no_change(compose_run):
    assert "hardware.num_gpus=4" not in texts(compose_run("workload.batch_size=6"), 8)


def test_a_change_leaves_the_run_alone(compose_run):
    run = compose_run("offload=cpu", "quant=fp16")
    before = deepcopy(run)
    found = {change.text: change.run for change in alternatives.one(run, 8)}

    assert run == before
    assert found["quant=int4"].quant == compose_run("quant=int4").quant
    assert found["quant=int4"].offload == run.offload
    assert found["quant=int4"].offload is not run.offload


@pytest.mark.parametrize(
    ("overrides", "key", "value", "text"),
    [
        ((), "verify", schema.Verify.off, "verify=off"),
        (("verify=off",), "verify", schema.Verify.off, None),
        ((), "workload.batch_size", 3, "workload.batch_size=3"),
        (("hardware.num_gpus=2",), "workload.batch_size", 3, None),
        (("engine.profile=reference",), "engine.profile", schema.Profile.tuned, "engine.profile=tuned"),
        (("engine=stream",), "engine.profile", schema.Profile.tuned, None),
        ((), "offload.resident", "auto", None),
        (("engine=stream",), "offload.resident", "auto", "offload.resident=auto"),
        (("engine=stream", "offload=nvme"), "offload.aio.block_size", 4096, "offload.aio.block_size=4096"),
    ],
    ids=str,
)
def test_a_setting_made_differently(compose_run, overrides, key, value, text):
    found = list(alternatives.with_setting(compose_run(*overrides), key, value))

    assert [change.text for change in found] == ([] if text is None else [text])
    if text is not None:
        assert found[0].run == compose_run(*overrides, text)
