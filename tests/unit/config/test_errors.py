import shlex

import pytest
from omegaconf import OmegaConf

from zi_experiments.config import errors
from zi_experiments.config.schema import conf_dir


@pytest.fixture
def advised(compose):
    """`advised(*arguments)` → what is said of a command line that Hydra does not take."""

    def advised(*arguments):
        with pytest.raises(Exception) as refused:  # noqa: PT011
            compose(*(a for a in arguments if not a.startswith("-")))
        text = errors.of_error(refused.value, list(arguments))
        assert "\n" not in text
        return text

    return advised


@pytest.mark.parametrize(
    ("typed", "proposal", "key", "value"),
    [
        ("offload.path=/mnt/été", "'offload.path=\"/mnt/été\"'", "offload.path", "/mnt/été"),
        ("model.path='/a", """'model.path="'"'"'/a"'""", "model.path", "'/a"),
        ("name=a(b", "'name=\"a(b\"'", "name", "a(b"),
        ("workload={'batch_size': 4}", "'workload={batch_size: 4}'", "workload.batch_size", 4),
    ],
)
def test_what_hydra_cannot_read_is_shown_as_it_is_typed(advised, compose, typed, proposal, key, value):
    assert advised(typed) == f"{typed} cannot be parsed by Hydra: quote it, with all of these quotes: {proposal}"

    assert OmegaConf.select(compose(*shlex.split(proposal)), key) == value


@pytest.mark.parametrize(("path", "value"), [("/data/my", "/data/my model 2"), ("/mon", '"/mon été"')])
def test_a_path_with_spaces_that_the_shell_has_split_is_put_together(advised, path, value):
    words = value.strip('"').removeprefix(path).split()

    assert advised("model=local", f"model.path={path}", *words) == (
        f"{words[0]} has no value: if it belongs to the value before it, quote both: 'model.path={value}'"
    )


def test_each_value_of_a_sweep_is_quoted_by_itself(advised):
    assert advised("-m", "offload.path=/mnt/été,/mnt/x").endswith("'offload.path=\"/mnt/été\",/mnt/x'")


def test_a_value_with_commas_is_a_sweep_or_quoted(advised):
    assert advised("model.path=/a,b").endswith("pass -m to run each, or 'model.path=\"/a,b\"' for one")


@pytest.mark.parametrize("word", ["foo", "été=3", "quant=int4,"])
def test_what_means_nothing_is_one_line_too(advised, word):
    assert advised("-m", word).startswith(word)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("offlod=cpu", "offload=cpu"),
        ("workload.batchsize=4", "workload.batch_size=4"),
        ("workload.Batch_Size=4", "workload.batch_size=4"),
        ("bits=4", "quant.bits=4"),
        ("seed=1", "weights.seed=1 or workload.seed=1"),
        ("experimnt=quality", "experiment=quality"),
        ("offload.aio.block_sise=4096", "offload.aio.block_size=4096"),
    ],
)
def test_a_key_that_is_none_is_told_what_it_was_meant_to_be(advised, typed, meant):
    assert advised(typed).endswith(f"is not a setting: pass {meant}")


@pytest.mark.parametrize("typed", ["quant.symmetric=1", "nonsense=1"])
def test_nothing_is_made_up_for_a_key_that_is_like_none(advised, typed):
    assert advised(typed).endswith("is not a setting: python -m zi_experiments --cfg job shows all settings")


def test_a_key_that_an_architecture_may_have_is_added(advised):
    assert "+model.architecture.attention_bias=true" in advised("model.architecture.attention_bias=true")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("hardware=rtx4090", "rtx-4090"), ("hardware=H100", "h100"), ("model=opt-13", "opt-13b"), ("quant=INT4", "int4")],
)
def test_a_choice_that_is_none_is_told_what_it_was_meant_to_be(advised, typed, meant):
    group = typed.partition("=")[0]
    choices = ", ".join(sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")))

    assert advised(typed) == f"{typed} is not a choice: pass {group}={meant}; there are {choices}"


def test_a_choice_like_none_has_the_list(advised):
    assert advised("offload=tape") == "offload=tape is not a choice: pass one of cpu, none, nvme"


def test_a_flag_is_told_to_be_a_setting():
    said = errors.of_flags(["-m", "--quant=int4,int8", "model=opt-125m", "--workload.batch_size=4"])

    assert said is not None
    assert "pass quant=int4,int8 workload.batch_size=4" in said
    assert "${args_no_hyphens}" in said
    assert errors.of_flags(["-m", "--config-dir", "x", "--cfg", "job", "quant=int4"]) is None
    assert errors.of_flags(["quant=int4", "-m", "offload=cpu,nvme"]) == (
        "offload=cpu,nvme: pass flags such as -m before all settings, or after them"
    )


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("quant.bits=four", "quant.bits takes an integer, or null: pass quant.bits=4"),
        ("weights.seed=1.5", "weights.seed takes an integer: pass weights.seed=0"),
        ("plan_only=maybe", "plan_only takes true or false: pass plan_only=false"),
        ("verify=perhaps", "verify takes on or off: pass verify=on"),
        ("launch.timeout_s=long", "launch.timeout_s takes a number: pass launch.timeout_s=1800"),
        ("hardware.memory_gib=big", "hardware.memory_gib takes a number, or null: pass hardware.memory_gib=null"),
        ("tracking.tags=alone", "tracking.tags takes a list: pass 'tracking.tags=[]'"),
        ("model.path=[a]", "model.path takes a text, or null: pass model.path=facebook/opt-125m"),
        (
            "hardware.calibration=3",
            "hardware.calibration takes settings in braces, or null: pass hardware.calibration=null",
        ),
    ],
)
def test_a_value_of_another_type_is_told_what_its_setting_takes(advised, compose, typed, said):
    assert advised(typed) == f"{typed}: {said}"

    compose(*shlex.split(said.partition(": pass ")[2]))
