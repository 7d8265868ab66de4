"""Whatever is asked for, the door from YAML to a `Run` gives exactly that or says in one line what is wrong."""

import json
import re
from copy import deepcopy
from dataclasses import is_dataclass
from enum import Enum
from functools import cache
from math import inf, isfinite, nan
from typing import get_type_hints

import pytest
import tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zi_experiments.config.composition import to_run
from zi_experiments.config.schema import Calibration, Ceilings, ConfigError, OffloadDevice, Run
from zi_experiments.cost_model import memory_fit
from zi_experiments.cost_model.bound import lower_bound
from zi_experiments.cost_model.prediction import predict
from zi_experiments.models import description
from zi_experiments.planner import planning
from zi_experiments.results.record import describe_plan

DEFAULTS = ("offload=nvme", "engine=stream")  # with which most settings have a meaning
many = settings(deadline=None, derandomize=True)  # as many as conftest.py says
some = settings(max_examples=40, deadline=None, derandomize=True)


def typed_settings(schema=Run, prefix=""):
    """Every setting that is no group, with its type."""
    for name, kind in get_type_hints(schema).items():
        if is_dataclass(kind):
            yield from typed_settings(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


SETTINGS = dict(typed_settings())
SINGLE = [key for key in SETTINGS if key not in ("question", "published")]  # which are groups, or null
TRUE_OR_FALSE = ("on", "off", "true", "false", "y", "n", "yes", "no")

numbers = (
    st.integers(-3, 20)
    | st.integers()
    | st.sampled_from((2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**40, 10**400))
    | st.floats(0, 1)
    | st.floats()
    | st.sampled_from((nan, inf, -inf, 1e308, 5e-324))
)
odd_texts = st.text(max_size=12) | st.sampled_from(
    (
        "",
        " ",
        "null",
        "auto",
        "on",
        "/mnt/x",
        "../../../etc/x",
        "a/b",
        "two\nlines",
        "two\r\nlines\u2028three",
        "[bold]x[/nope]",
        "nul\0inside",
        "\x1b[31m",
        "ends with \\",
        "%s {x} {",
        "x" * 300,
    )
)
interpolations = st.sampled_from(
    (
        "${nowhere}",
        "${name}",
        "${model}",
        "${offload}",
        "${tracking.tags}",
        "${model.architecture}",
        "${workload.batch_size}",
        "${offload.aio}",
        "${oc.env:ZI_NOT_THERE}",
        "${no.such.resolver:1}",
        "${zi.data:null}",
        "???",
    )
)
lists = st.lists(st.integers(0, 3) | st.text(max_size=3), max_size=3)
values = numbers | odd_texts | interpolations | lists | st.booleans() | st.none() | st.just({"a": 1})


@pytest.fixture(scope="module")
def composed(compose):
    return compose(*DEFAULTS)


def asked(composed, overrides):
    """A configuration with values laid over it; None where the schema itself refuses one, before the door."""
    cfg = deepcopy(composed)
    try:
        for key, value in overrides.items():
            OmegaConf.update(cfg, key, value, merge=False)
    except (OmegaConfBaseException, OverflowError):
        return None
    return cfg


def reached(node, key):
    for name in key.split("."):
        node = getattr(node, name)
    return node


def plain(value):
    return value.value if isinstance(value, Enum) else value


def same(one, other):
    return type(one) is type(other) and (one == other or (one != one and other != other))


def assert_one_line(error, *keys):
    message = str(error)
    assert message.splitlines() == [message]
    assert "pass " in message or any(key in message for key in keys), message


@many
@given(st.sampled_from(list(SETTINGS)), values)
def test_a_run_has_the_value_that_was_asked_for_or_is_refused_in_one_line(composed, key, value):
    cfg = asked(composed, {key: value})
    assume(cfg is not None)
    try:
        run = to_run(cfg)
    except ConfigError as error:
        assert_one_line(error, key)
        return

    # the configuration as it will be recorded, which OmegaConf has made of what was typed
    recorded = OmegaConf.select(cfg, key)
    recorded = OmegaConf.to_container(recorded) if OmegaConf.is_config(recorded) else recorded
    found = reached(run, key)
    assert same(plain(found), plain(recorded)) or found == recorded
    if isinstance(value, str | int | float) and not str(value).startswith("${"):
        assert_is_what_was_typed(found, value)


def assert_is_what_was_typed(found, value):
    """The text of a number is that number, a number is true when it is not zero, and anything has a text: no more."""
    found = plain(found)
    if isinstance(found, bool) and isinstance(value, str):
        assert value.lower() in TRUE_OR_FALSE or bool(int(value)) == found
    elif isinstance(found, bool | float):
        assert same(found, type(found)(value))
    elif isinstance(found, int) and isinstance(value, str):
        assert found == int(value)
    elif isinstance(found, str):
        assert found == str(value)
    else:
        assert found == value


@pytest.mark.parametrize("key", SETTINGS)
def test_a_text_of_several_lines_is_quoted_in_one(composed, key):
    cfg = asked(composed, {key: "two\nlines\u2028three"})
    if cfg is None:
        return
    try:
        assert reached(to_run(cfg), key) == "two\nlines\u2028three"
    except ConfigError as error:
        assert_one_line(error, key)


@some
@given(st.dictionaries(st.sampled_from(SINGLE), values, min_size=2, max_size=4))
def test_several_values_at_once(composed, overrides):
    cfg = asked(composed, overrides)
    assume(cfg is not None)
    try:
        to_run(cfg)
    except ConfigError as error:
        assert_one_line(error, *overrides)


def quoted(text):
    """A text as Hydra's grammar of overrides has it, between quotes."""
    inside = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", inside) + "'"


@some
@given(
    st.sampled_from(("name", "model.name", "tracking.project", "quant.name")), odd_texts.filter(lambda t: "$" not in t)
)
def test_a_name_of_any_characters_comes_through_the_command_line(compose, key, text):
    assume(text != "???")  # which means that the value is missing

    assert reached(to_run(compose(f"{key}={quoted(text)}")), key) == text


FAMILIES = ("opt", "bloom", "mixtral", "gemma2")
describe_tiny = cache(lambda family: description.describe(tiny.config(family), family))
counts = st.sampled_from((*range(1, 40), 2**31, 2**62, 2**63 - 1))


@st.composite
def plannable(draw):
    """Choices and settings that mostly go together."""
    engine = draw(st.sampled_from(("deepspeed", "stream", "accelerate", "fsdp")))
    offload = draw(st.sampled_from(("none", "cpu", "nvme")))
    quants = ("int4", "int8", "fp16") if engine in ("deepspeed", "stream") else ("fp16",)
    quant = draw(st.sampled_from(quants))
    possible = {
        "workload.batch_size": counts.map(lambda count: 12 * min(count, 2**59)) | st.just("auto"),
        "workload.prompt_len": counts,
        "workload.gen_len": counts,
        "verify": st.sampled_from(("on", "off")),
    }
    if offload != "none":
        possible |= {"offload.pin_memory": st.booleans()}
    if engine == "stream":
        possible |= {"workload.micro_batches": counts}
        possible |= {"offload.resident": st.sampled_from((0, 1, "auto")) | st.floats(0, 1)} if offload != "none" else {}
    if engine == "deepspeed":
        possible |= {"engine.profile": st.sampled_from(("tuned", "reference"))}
        possible |= {"offload.buffer_count": counts, "offload.buffer_size": counts} if offload == "nvme" else {}
    if offload == "nvme":
        possible |= {"offload.aio.block_size": st.sampled_from((4096, 1 << 20, 1 << 40))}
    wanted = {"hardware.num_gpus": st.integers(1, 4) if engine != "accelerate" else st.just(1)}
    if quant != "fp16":
        wanted |= {"quant.group_size": st.sampled_from((16, 4, 3, 32)), "quant.group_dim": st.integers(0, 1)}
    settings = draw(st.fixed_dictionaries(wanted, optional=possible))
    choices = {"engine": engine, "offload": offload, "quant": quant, "kv_cache": draw(st.sampled_from(("gpu", "cpu")))}
    return choices, {"workload.batch_size": 12, **settings}


unknown = st.none()
rates = unknown | st.floats(1, 1e300)
overheads = unknown | st.floats(0, 1e6)
calibrations = st.builds(
    Calibration,
    link_back_bytes_per_s=rates,
    link_both_bytes_per_s=rates,
    link_pageable_bytes_per_s=rates,
    pin_bytes_per_s=rates,
    host_bytes_per_s=rates,
    disk_write_bytes_per_s=rates,
    gemm_flops=st.dictionaries(
        st.sampled_from(("float16", "bfloat16")),
        st.dictionaries(st.integers(1, 10**5), st.floats(1, 1e300), min_size=1, max_size=4),
    ),
    attention_flops=rates,
    cache_bytes_per_s=rates,
    host_read_bytes_per_s=rates,
    host_layer_s=overheads,
    host_layer_busy_s=overheads,
    link_busy_bytes_per_s=rates,
    host_experts_bytes_per_s=rates,
    expand_elements_per_s=rates,
    layer_s=overheads,
    step_s=overheads,
    moments=st.none(),
)
machines = st.fixed_dictionaries(
    {"host_memory_bytes": st.sampled_from((10**13, 10**10, 10**9)) | st.integers(0, 10**6)},
    optional={
        "calibration": calibrations,
        "disk_free_bytes": st.sampled_from((10**13, 10**5, 0)),
        "gpu_memory_bytes": st.sampled_from((10**11, 2 * 10**9, 10**9)) | st.integers(0, 10**6),
        "gpu_memory_is_capped": st.booleans(),
        "ceilings": st.builds(
            Ceilings,
            link_bytes_per_s=rates,
            hbm_bytes_per_s=rates,
            flops=rates,
            disk_bytes_per_s=rates,
            host_memory_bytes_per_s=rates,
            source=st.none(),
        ),
    },
)


def machine_of(machine, name, changes):
    if name == "cpu":
        changes = {key: value for key, value in changes.items() if not key.startswith("gpu")}
    return machine(name, **changes)


@many
@given(st.sampled_from(FAMILIES), plannable(), st.sampled_from(("h200", "cpu")), machines)
def test_a_plan_adds_up_or_is_refused_in_one_line(compose, machine, family, wanted, device, changes):
    choices, overrides = wanted
    cfg = asked(compose(*map("=".join, choices.items())), overrides)
    try:
        run = to_run(cfg)
        plan = planning.build(run, describe_tiny(family), machine_of(machine, device, changes))
    except ConfigError as error:
        assert_one_line(error)
        return

    assert_weights_add_up(plan)
    assert_memory_is_enough(plan)
    assert_bound_is_finite(plan)
    assert_prediction_holds(plan)
    assert run.workload.batch_size in ("auto", plan.run.workload.batch_size)
    json.dumps(describe_plan(plan, predict(plan)), allow_nan=False)


def assert_weights_add_up(plan):
    ranks, place, weights = plan.run.hardware.num_gpus, plan.placement, plan.weight_bytes
    assert min(place.gpu_bytes, place.cpu_bytes, place.nvme_bytes) >= 0
    assert place.gpu_bytes + place.cpu_bytes + place.nvme_bytes == weights
    assert 0 <= plan.storage.copied_bytes <= (ranks - 1) * weights
    assert plan.storage.copied_bytes == 0 or plan.run.engine.name == "stream"
    assert 0 <= plan.streamed_bytes_per_pass <= weights
    assert plan.machine.device == "cuda" or place.gpu_bytes == plan.streamed_bytes_per_pass == 0
    assert plan.run.offload.device is OffloadDevice.nvme or place.nvme_bytes == 0
    assert 0 <= plan.disk_bytes_per_step <= place.nvme_bytes
    assert 0 <= plan.disk_bytes_per_pass <= place.nvme_bytes
    assert 0 <= plan.packed_fraction <= plan.quantized_fraction <= 1


def assert_memory_is_enough(plan):
    stored, place, ranks = plan.storage, plan.placement, plan.run.hardware.num_gpus
    assert min(stored.host_buffer_bytes, stored.gpu_buffer_bytes, stored.locked_bytes) >= 0
    assert min(plan.kv_cache_bytes, plan.kv_slot_bytes, plan.kv_link_bytes_per_pass, plan.reference_bytes) >= 0
    assert place.cpu_bytes + stored.host_buffer_bytes <= plan.machine.host_memory_bytes
    if plan.machine.gpu_memory_bytes is not None:
        weights = (place.gpu_bytes + stored.copied_bytes) // ranks
        assert weights + stored.gpu_buffer_bytes <= plan.machine.gpu_memory_bytes
    for use in memory_fit.uses(plan):
        assert min(use.weights, use.buffers, use.kv_cache, use.workspace, use.processes) >= 0
        assert use.total <= use.available
    if plan.pin_memory:
        assert plan.machine.device == "cuda"
        assert plan.run.offload.device is not OffloadDevice.none


def assert_bound_is_finite(plan):
    bound = lower_bound(plan)
    assert (bound.decode_step_s is None) == (bound.limited_by is None)
    for seconds in (bound.prefill_s, bound.decode_step_s):
        assert seconds is None or (isfinite(seconds) and seconds > 0)


def assert_prediction_holds(plan):
    """Nothing takes less than no time, or less than what is streamed takes over the fastest of its ways."""
    got, rates, known = predict(plan), plan.machine.ceilings, plan.machine.calibration
    for seconds, limit in ((got.prefill_s, got.prefill_limited_by), (got.decode_step_s, got.limited_by)):
        assert seconds is None or (isfinite(seconds) and seconds > 0)
        assert (seconds is None) == (limit is None)
    assert got.load_s is None or (isfinite(got.load_s) and got.load_s > 0)
    if known is None:
        assert (got.load_s, got.prefill_s, got.decode_step_s, got.total_tok_per_s) == (None, None, None, None)
    if got.total_tok_per_s is not None:
        work = plan.run.workload
        assert 0 < got.total_tok_per_s <= work.sequences * work.gen_len / got.prefill_s * (1 + 1e-9)
    if rates.link_bytes_per_s and got.decode_step_s:
        fastest = max(rates.link_bytes_per_s, (known and known.link_pageable_bytes_per_s) or 0)
        least = plan.streamed_bytes_per_step / plan.run.hardware.num_gpus / fastest
        assert got.decode_step_s >= least * (1 - 1e-9)
    if rates.disk_bytes_per_s and got.decode_step_s:
        assert got.decode_step_s >= plan.disk_bytes_per_step / rates.disk_bytes_per_s * (1 - 1e-9)
