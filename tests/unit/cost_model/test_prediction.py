"""What a plan predicts, by hand: OPT-13B in 16 bits, 8 sequences of 512 prompt tokens, 32 generated, one rate at a time."""

from dataclasses import replace
from math import inf, sqrt

import pytest

from zi_experiments.config.schema import Calibration, Ceilings, WeightSource
from zi_experiments.cost_model import prediction as module
from zi_experiments.cost_model.bound import lower_bound
from zi_experiments.cost_model.plan import Overlap
from zi_experiments.cost_model.prediction import predict

LAYERS, HIDDEN, WIDEST, VOCABULARY = 40, 5120, 20480, 50272
MATRICES = LAYERS * 12 * HIDDEN**2
HEAD = VOCABULARY * HIDDEN
STREAMED = 2 * 12_853_473_280 - 2 * (LAYERS * 13 * HIDDEN + 2 * HIDDEN)
MIDDLE = 512 + 16  # tokens in the cache of the middle step
KV_TOKEN = 2 * LAYERS * HIDDEN  # elements
EXPERT = 3 * 4096 * 14336  # elements of one of Mixtral's

ENDLESS = 1e40
ENDLESS_RATES = Ceilings(
    link_bytes_per_s=ENDLESS,
    hbm_bytes_per_s=ENDLESS,
    flops=ENDLESS,
    disk_bytes_per_s=ENDLESS,
    host_memory_bytes_per_s=None,
    source=None,
)
INSTANT = Calibration(
    link_back_bytes_per_s=ENDLESS,
    link_both_bytes_per_s=ENDLESS,
    link_pageable_bytes_per_s=ENDLESS,
    pin_bytes_per_s=ENDLESS,
    host_bytes_per_s=ENDLESS,
    disk_write_bytes_per_s=ENDLESS,
    gemm_flops={"float16": {1: ENDLESS}},
    attention_flops=None,
    cache_bytes_per_s=None,
    expand_elements_per_s=ENDLESS,
    layer_s=0.0,
    step_s=0.0,
    host_read_bytes_per_s=None,
    host_layer_s=None,
    host_layer_busy_s=None,
    link_busy_bytes_per_s=None,
    host_experts_bytes_per_s=None,
    moments=None,
)
PERFECT = Overlap(hidden=1.0, launch=0.0, stall=0.0, load_s=0.0)


@pytest.fixture
def planned(make_plan, machine):
    """`planned(*overrides, known={…}, overlap={…}, **ceilings)` → the plan where all else takes the machine no time."""

    def planned(*overrides, known=None, overlap=None, name="h200", model="opt-13b", **ceilings):
        calibration, rates = replace(INSTANT, **known or {}), replace(ENDLESS_RATES, **ceilings)
        on = machine(name, ceilings=rates, calibration=calibration, dtypes=("float16",))
        quant = () if any(each.startswith("quant=") for each in overrides) else ("quant=fp16",)
        work = (*quant, "workload=zero-inference", f"model={model}")
        plan = make_plan(*work, *overrides, on=on)
        return replace(plan, storage=replace(plan.storage, overlap=replace(PERFECT, **overlap or {})))

    return planned


def near(value):
    return pytest.approx(value, rel=1e-9)


# --- copies ---------------------------------------------------------------------------------------------------------


def test_what_is_streamed_takes_the_link(planned):
    got = predict(planned("offload=cpu", link_bytes_per_s=50e9))

    assert [got.prefill_s, got.decode_step_s] == [near(STREAMED / 50e9)] * 2
    assert (got.prefill_limited_by, got.limited_by) == ("link", "link")
    assert got.total_tok_per_s == near(8 * 32 / (32 * STREAMED / 50e9))


def test_ranks_share_the_link(planned):
    one, two = (planned("offload=cpu", f"hardware.num_gpus={ranks}", link_bytes_per_s=50e9) for ranks in (1, 2))

    assert predict(two).decode_step_s == near(predict(one).decode_step_s / 2)


@pytest.mark.parametrize(("pinned", "rate"), [("true", 50e9), ("false", 10e9)])
def test_what_is_not_pinned_crosses_as_slowly_as_that_was_measured(planned, pinned, rate):
    known = {"link_pageable_bytes_per_s": 10e9}
    plan = planned("offload=cpu", f"offload.pin_memory={pinned}", known=known, link_bytes_per_s=50e9)

    assert predict(plan).decode_step_s == near(STREAMED / rate)


def test_keys_and_values_on_the_host_cross_too(planned):
    got = predict(planned("offload=cpu", "kv_cache=cpu", link_bytes_per_s=50e9))

    assert got.decode_step_s == near((STREAMED + 2 * 8 * KV_TOKEN * MIDDLE) / 50e9)
    assert got.prefill_s == near(STREAMED / 50e9)  # there are none yet


def test_moving_keys_and_values_is_launched_layer_by_layer(planned):
    known = {"layer_s": 0.1, "step_s": 2.0}
    here, there = (
        planned("offload=cpu", f"kv_cache={place}", known=known, overlap={"launch": 3.0}) for place in ("gpu", "cpu")
    )

    assert predict(here).decode_step_s == near(2 + 3.0 * 0.1 * 40)
    assert predict(there).decode_step_s == near(2 + 3.5 * 0.1 * 40)
    assert predict(there).limited_by == "launch"


RECORDED = {
    "small_s": 0.01,
    "small_routed_s": 0.02,
    "choice": 0.5,
    "fetch": 0.25,
    "copy_s": 0.001,
    "launch": 9.0,
    "launch_routed": 9.0,
    "stall": 9.0,
    "packed": 0.5,
}


@pytest.mark.parametrize(
    ("model", "more", "layer_s"),
    [
        ("opt-13b", ("offload=none",), 0.01),
        ("mixtral-8x7b", ("offload=none",), 0.03),  # with all experts on the GPU no choice is read
        ("mixtral-8x7b", ("offload=cpu",), 0.03 + 0.75 * 0.1),
    ],
)
def test_a_recorded_step_has_its_small_operations_and_choices(planned, model, more, layer_s):
    """They are added to what is computed and copied: GPU, host and link take turns, but for experts that came earlier."""
    known = {"layer_s": 0.1, "step_s": 2.0, "expand_elements_per_s": 1e12}
    given = ("engine=stream", "quant=int4", "workload.batch_size=1", *more)
    plan = planned(*given, known=known, overlap=RECORDED | {"hidden": 0.0}, model=model, link_bytes_per_s=50e9)
    seconds = module._pass_s(plan, module._Pass(tokens=1, cached=MIDDLE))

    assert plan.storage.recorded
    assert seconds["launch"] == near(2 + plan.architecture.num_layers * layer_s)
    copied, hidden = plan.streamed_bytes_per_step / 50e9, 0.0
    if copied:  # two experts in each layer, one after the other: the first is multiplied while the second is copied
        copied += 0.001 * 32 * 2
        hidden = 0.5 * 32 * EXPERT / 1e12
    assert predict(plan).decode_step_s == near(seconds["launch"] + seconds["hbm"] + seconds["gemm"] + copied - hidden)


@pytest.mark.parametrize(
    ("copied", "layers", "hidden"),  # of experts; layers that wait for some; experts whose products hide
    [
        (0, 0, 0),
        (8, 8, 8),  # in eight layers one of two experts: the other is computed meanwhile
        (32, 32, 32),
        (48, 32, 32),  # 1.5 of two in each layer: only the one that is copied last is not hidden
        (64, 32, 32),
    ],
)
def test_a_step_that_finds_experts_on_the_gpu_waits_for_the_others(planned, copied, layers, hidden):
    known = {"layer_s": 0.1, "expand_elements_per_s": 1e12}
    given = ("engine=stream", "quant=int4", "workload.batch_size=1", "offload=cpu")
    plan = planned(*given, known=known, overlap=RECORDED, model="mixtral-8x7b", link_bytes_per_s=50e9)
    each = plan.storage.expert_bytes

    def step_s(experts):
        found = replace(plan, storage=replace(plan.storage, streamed_bytes_per_step=experts * each))
        return predict(found).decode_step_s

    expected = copied * (each / 50e9 + 0.001) + layers * 0.25 * 0.1 - hidden * 0.5 * EXPERT / 1e12
    assert step_s(copied) - step_s(0) == near(expected)


def test_keys_and_values_cross_pinned_whatever_the_weights(planned):
    known = {"link_pageable_bytes_per_s": 10e9}
    plan = planned("offload=cpu", "kv_cache=cpu", "offload.pin_memory=false", known=known, link_bytes_per_s=50e9)

    assert predict(plan).decode_step_s == near(STREAMED / 10e9 + 2 * 8 * KV_TOKEN * MIDDLE / 50e9)


HOST = {"host_layer_s": 0.010, "host_layer_busy_s": 0.012, "link_busy_bytes_per_s": 40e9}
LAYER_BYTES = STREAMED / LAYERS


@pytest.mark.parametrize(("layers", "crossings"), [(10, 10), (20, 20), (30, 10), (40, 1)])
def test_the_host_computes_while_the_link_brings_the_other_layers(planned, layers, crossings):
    """Both share the host's memory: one of them ends, and the other goes on alone, at its usual rate."""
    plan = planned("engine=stream", "offload=cpu", f"offload.compute={layers / 40}", known=HOST, link_bytes_per_s=50e9)
    got = predict(plan)

    crossing_s = crossings * module.CROSSING_S
    copies, alone = (40 - layers) * plan.streamed_bytes_per_pass / 40, crossing_s + 0.012 * layers
    if copies / 40e9 > alone:
        expected = alone + (copies - alone * 40e9) / 50e9
    else:
        expected = copies / 40e9 + (1 - copies / 40e9 / alone) * (crossing_s + 0.010 * layers)
    assert got.decode_step_s == near(expected)
    assert got.decode_step_on_gpu_s == near(plan.streamed_bytes_per_pass / 50e9)
    assert got.limited_by == ("host" if layers > 20 else "link")
    assert got.prefill_s == near(plan.streamed_bytes_per_pass / 50e9)


@pytest.mark.parametrize("layer_s", [0.001, 0.01])
def test_layers_are_launched_while_the_host_computes(planned, layer_s):
    """What is outside of the layers comes after them."""
    known = {"host_layer_s": 0.010, "layer_s": layer_s, "step_s": 0.05}
    plan = planned("engine=stream", "offload=cpu", "offload.compute=0.5", known=known, overlap={"launch": 2.0})

    by_host_s = 20 * 0.010 + 20 * module.CROSSING_S
    assert predict(plan).decode_step_s == near(0.05 + max(by_host_s, 20 * 2 * layer_s))


@pytest.mark.parametrize("host", [20e9, 80e9])
def test_experts_on_the_host_end_with_the_copies_of_others(planned, host):
    """At the rates that they have beside each other; when the host has ended, copies go on at their usual rate."""
    known = {"host_experts_bytes_per_s": host, "link_busy_bytes_per_s": 40e9}
    half = ("engine=stream", "offload=cpu", "workload.batch_size=1", "offload.compute=0.5")
    plan = planned(*half, model="mixtral-8x7b", known=known, link_bytes_per_s=50e9)
    got, each = predict(plan), plan.streamed_bytes_per_step

    assert plan.storage.host_bytes_per_step == each
    assert got.decode_step_s == near(each / host if host < 40e9 else each / host + each * (1 - 40e9 / host) / 50e9)
    assert got.limited_by == ("host" if host < 50e9 else "link")
    assert got.decode_step_on_gpu_s == near(2 * each / 50e9)


def test_a_share_too_small_for_an_expert_is_the_step_of_the_gpu(planned):
    known = {"host_experts_bytes_per_s": 20e9, "link_busy_bytes_per_s": 40e9}
    little = ("engine=stream", "offload=cpu", "workload.batch_size=1", "offload.compute=0.05")
    plan = planned(*little, model="mixtral-8x7b", known=known, link_bytes_per_s=50e9)
    got = predict(plan)

    assert plan.storage.host_bytes_per_step == 0
    assert got.decode_step_on_gpu_s == got.decode_step_s == near(plan.streamed_bytes_per_step / 50e9)


def test_without_the_hosts_rate_its_steps_are_not_predicted(planned):
    assert predict(planned("engine=stream", "offload=cpu", "offload.compute=0.5")).decode_step_s is None


def test_the_host_reads_its_layers_at_least(planned):
    """As its cores read memory; without that rate it does not count."""
    choices = ("engine=stream", "offload=cpu", "offload.compute=0.5")
    plan = planned(*choices, known=HOST | {"host_read_bytes_per_s": 40e9}, link_bytes_per_s=50e9)
    read = (2 * MATRICES + 2 * 8 * KV_TOKEN * 512) / 2
    bound, unknown = lower_bound(plan), lower_bound(planned(*choices, known=HOST, link_bytes_per_s=50e9))

    assert bound.decode_step_s == near(read / 40e9)
    assert bound.limited_by == "host"
    assert unknown.decode_step_s == near(plan.streamed_bytes_per_step / 50e9)


def test_all_ranks_share_a_disk(planned):
    for ranks in (1, 2):
        plan = planned("offload=nvme", f"hardware.num_gpus={ranks}", disk_bytes_per_s=5e9)
        got = predict(plan)
        assert got.decode_step_s == near(STREAMED / 5e9)
        assert got.limited_by == got.prefill_limited_by == "disk"


def test_the_slower_of_link_and_disk_counts(planned):
    slow_disk = planned("offload=nvme", link_bytes_per_s=50e9, disk_bytes_per_s=5e9)
    slow_link = planned("offload=nvme", link_bytes_per_s=1e9, disk_bytes_per_s=5e9)

    assert predict(slow_disk).decode_step_s == near(STREAMED / 5e9)
    assert predict(slow_link).decode_step_s == near(STREAMED / 1e9)
    assert predict(slow_link).limited_by == "link"


# --- products -------------------------------------------------------------------------------------------------------


def test_products_go_as_fast_as_those_of_so_many_rows(planned):
    curve = {"bfloat16": {8: 1.0, 4096: 1.0}, "float16": {8: 16e12, 4096: 400e12}}
    got = predict(planned("offload=none", known={"gemm_flops": curve}))

    assert got.decode_step_s == near(2 * (MATRICES + HEAD) * 8 / 16e12)
    attention = 2 * 8 * 512**2 * HIDDEN * LAYERS
    # of a prompt the head sees the last token alone
    assert got.prefill_s == near((2 * MATRICES * 4096 + attention) / 400e12 + 2 * HEAD * 8 / 16e12)
    assert (got.prefill_limited_by, got.limited_by) == ("gemm", "gemm")


@pytest.mark.parametrize(
    ("curve", "rate"),
    [
        ({4: 4e12, 64: 64e12}, 8e12),  # proportional
        ({2: 4e12, 32: 16e12}, 8e12),  # half-way by logarithms
        ({1: 1e12, 2: 4e12, 32: 16e12, 33: 99e12}, 8e12),  # between those two, of several
        ({32: 64e12, 4096: 100e12}, 16e12),  # fewer rows take as long as the fewest measured
        ({1: 1e12, 4: 5e12}, 5e12),  # more are as fast as the most
        ({8: 7e12}, 7e12),
        ({1: 1e12, 8: 7e12, 64: 9e12}, 7e12),
    ],
    ids=str,
)
def test_between_what_was_measured_both_axes_are_logarithmic(planned, curve, rate):
    assert module._interpolate(curve, 8) == near(rate)
    got = predict(planned("offload=none", known={"gemm_flops": {"float16": curve}}))
    assert got.decode_step_s == near(2 * (MATRICES + HEAD) * 8 / rate)


def test_half_way_by_logarithms():
    assert module._interpolate({1: 1e12, 100: 9e12}, 10) == near(3e12)
    assert module._interpolate({1: 1e12, 100: 9e12}, sqrt(10)) == near(sqrt(3) * 1e12)


def test_each_rank_multiplies_its_share_of_the_rows(planned):
    plan = planned("offload=none", "hardware.num_gpus=2", known={"gemm_flops": {"float16": {4: 8e12, 8: 999e12}}})

    assert predict(plan).decode_step_s == near(2 * (MATRICES + HEAD) * 4 / 8e12)


def test_micro_batches_multiply_and_launch_one_after_the_other_and_stream_once(planned):
    work = ("offload=cpu", "engine=stream", "workload.batch_size=8", "workload.micro_batches=4")
    known = {"gemm_flops": {"float16": {8: 16e12}}, "layer_s": 1e-3, "step_s": 5e-3}
    seconds = module._pass_s(
        planned(*work, known=known, overlap={"launch": 2.0}, link_bytes_per_s=50e9), module._Pass(tokens=1, cached=0)
    )
    one = module._pass_s(
        planned(*work[:-1], known=known, overlap={"launch": 2.0}, link_bytes_per_s=50e9),
        module._Pass(tokens=1, cached=0),
    )

    assert seconds["gemm"] == near(4 * 2 * (MATRICES + HEAD) * 8 / 16e12)
    assert seconds["launch"] == near(4 * LAYERS * 2 * 1e-3 + 5e-3)
    assert seconds["link"] == one["link"] > 0
    assert one["gemm"] == near(seconds["gemm"] / 4)


@pytest.mark.parametrize(("batch", "met"), [(1, 2), (2, 3.5), (16, 8 * (1 - 0.75**16))])
def test_experts_that_are_met_are_read_whole(planned, batch, met):
    """Mixtral: each token is sent to 2 of 8, drawn evenly; each expert is read once, however many rows it sees."""
    by_rows = {1: 1e12, 32: 32e12}
    plan = planned(
        "offload=none",
        f"workload.batch_size={batch}",
        model="mixtral-8x7b",
        known={"gemm_flops": {"float16": by_rows}},
    )
    dense = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 8 * 4096) + 32000 * 4096
    expert = 32 * 3 * 4096 * 14336

    assert predict(plan).decode_step_s == near(2 * (dense + met * expert) / 1e12)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_activations_and_keys_and_values_move_in_memory(planned):
    plan = planned("offload=none", hbm_bytes_per_s=4e12)
    decode = module._pass_s(plan, module._Pass(tokens=1, cached=MIDDLE))
    prefill = module._pass_s(plan, module._Pass(tokens=512, cached=0))

    activations = 8 * LAYERS * (14 * HIDDEN + 4 * WIDEST)
    assert decode["hbm"] == near(2 * (activations + 3 * 8 * KV_TOKEN * (MIDDLE + 1)) / 4e12)
    assert prefill["hbm"] == near(2 * (512 * activations + 2 * 8 * KV_TOKEN * 512) / 4e12)


def test_a_processor_moves_activations_slower_than_it_copies(planned):
    gpu, cpu = (planned("offload=none", name=name, hbm_bytes_per_s=4e11) for name in ("h200", "cpu"))
    prompt = module._Pass(tokens=512, cached=0)

    assert module._pass_s(cpu, prompt)["hbm"] == near(module._pass_s(gpu, prompt)["hbm"] / 0.35)
    assert module._pass_s(cpu, prompt)["gemm"] == module._pass_s(gpu, prompt)["gemm"]


def test_attention_has_rates_of_its_own_where_they_are_measured(planned):
    """Over a prompt it is arithmetic, and for one more token it reads keys and values."""
    known = {"gemm_flops": {"float16": {1: 1e12}}, "attention_flops": 1e11, "cache_bytes_per_s": 1e10}
    plan = planned("offload=none", name="cpu", known=known)
    plain = planned("offload=none", name="cpu", known={"gemm_flops": known["gemm_flops"]})
    prompt, token = module._Pass(tokens=512, cached=0), module._Pass(tokens=1, cached=MIDDLE)
    operations = 2 * 8 * 512**2 * HIDDEN * LAYERS

    slower = module._pass_s(plan, prompt)["gemm"] - module._pass_s(plain, prompt)["gemm"]
    assert slower == near(operations / 1e11 - operations / 1e12)
    assert module._pass_s(plan, token)["gemm"] == module._pass_s(plain, token)["gemm"]
    assert module._pass_s(plan, token)["hbm"] == near(2 * 8 * KV_TOKEN * (MIDDLE + 1) / 1e10)
    assert module._pass_s(plan, prompt)["hbm"] == near(0)


def test_what_an_engine_copies_is_read_and_written(planned):
    one = module._Pass(tokens=1, cached=MIDDLE)
    plan, plain = (planned("offload=none", overlap={"copies": n}, hbm_bytes_per_s=4e12) for n in (3.0, 0.0))

    copied_s = module._pass_s(plan, one)["hbm"] - module._pass_s(plain, one)["hbm"]
    assert copied_s == near(3 * 2 * plan.weight_bytes / 4e12)


def test_quantized_weights_are_expanded_in_every_pass(planned):
    measured = planned("offload=none", "quant=int4", known={"expand_elements_per_s": 1e12})
    unmeasured = planned("offload=none", "quant=int4", known={"expand_elements_per_s": None}, hbm_bytes_per_s=4e12)
    plain = planned("offload=none", hbm_bytes_per_s=4e12)
    one = module._Pass(tokens=1, cached=MIDDLE)

    assert predict(measured).decode_step_s == near(MATRICES / 1e12)
    assert predict(measured).limited_by == "hbm"
    slow = planned("offload=none", "quant=int4", known={"expand_elements_per_s": 1e12}, overlap={"expand": 2.5})
    assert predict(slow).decode_step_s == near(2.5 * MATRICES / 1e12)
    difference = module._pass_s(unmeasured, one)["hbm"] - module._pass_s(plain, one)["hbm"]
    assert difference == near(2.5 * MATRICES / 4e12)


IN_GROUPS = (
    "{quant_method:compressed-tensors,format:pack-quantized,config_groups:{all:{targets:[Linear],"
    "weights:{num_bits:4,type:int,strategy:group,symmetric:true,group_size:32}}}}"
)


@pytest.mark.parametrize(
    ("stated", "on_gpu", "on_cpu"),
    [("{quant_method:fp8,weight_block_size:[128,128]}", 1.3, 2.0), (IN_GROUPS, 1.5, 0.9)],
)
def test_each_format_takes_its_own_time_to_expand(planned, stated, on_gpu, on_cpu):
    one = module._Pass(tokens=1, cached=MIDDLE)
    given = ("engine=stream", "quant=native", "offload=none", f"+model.architecture.quantization_config={stated}")
    for name, multiple in (("h200", on_gpu), ("cpu", on_cpu)):
        plan = planned(*given, name=name, model="qwen3-0.6b", known={"expand_elements_per_s": 1e9})
        layers = [p for p in plan.architecture.parameters if p.layer is not None]
        quantized = sum(p.numel for p in layers if p.native)

        assert quantized > 4e8
        assert module._expanding_s(plan, one, layers) == near(multiple * quantized / 1e9)


# --- launches, and what goes on at once -----------------------------------------------------------------------------


def test_launching_is_work_of_the_host(planned):
    plan = planned("offload=none", known={"layer_s": 1e-3, "step_s": 5e-3}, overlap={"launch": 3.0})
    got = predict(plan)

    assert got.prefill_s == got.decode_step_s == near(LAYERS * 3 * 1e-3 + 5e-3)
    assert got.limited_by == "launch"


SECONDS = {"link": 6.0, "disk": 2.0, "gemm": 1.0, "hbm": 3.0, "launch": 2.0}


@pytest.mark.parametrize(
    ("name", "seconds", "hidden", "expected"),
    [
        ("h200", {}, 1.0, 6.0),
        ("h200", {}, 0.5, 6.0 + 0.5 * 4.0),
        ("h200", {}, 0.0, 6.0 + 4.0),
        # the shorter is hidden behind the longer, whichever that is
        ("h200", {"link": 1.0}, 0.5, 4.0 + 0.5 * 2.0),
        ("h200", {"link": 1.0}, 0.0, 4.0 + 2.0),
        ("h200", {"disk": 8.0}, 0.0, 8.0 + 4.0),
        # a GPU computes while its host launches what comes next
        ("h200", {"launch": 5.0}, 0.0, 6.0 + 5.0),
        # a CPU does one after the other
        ("cpu", {"link": 0.0, "disk": 0.0}, 0.0, 6.0),
        ("cpu", {"link": 0.0, "launch": 5.0, "disk": 7.0}, 0.0, 9.0 + 7.0),
    ],
    ids=str,
)
def test_copies_and_computing_share_a_pass(planned, name, seconds, hidden, expected):
    plan = planned("offload=cpu", name=name, overlap={"hidden": hidden})

    assert module._duration(plan, module._Pass(tokens=512, cached=0), SECONDS | seconds) == near(expected)


def test_overlap_of_a_whole_prediction(planned):
    """A link of 25.7 s and products of 6.5 s."""
    known, link = {"gemm_flops": {"float16": {8: 2 * (MATRICES + HEAD) * 8 / 6.5}}}, STREAMED / 25.7
    times = [
        predict(planned("offload=cpu", known=known, overlap={"hidden": hidden}, link_bytes_per_s=link)).decode_step_s
        for hidden in (0.0, 0.5, 1.0)
    ]

    assert times == [near(32.2), near(28.95), near(25.7)]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("engine=deepspeed", "engine.profile=tuned"), lambda disk, work: disk + work),
        (("engine=deepspeed", "engine.profile=reference"), lambda disk, work: disk + work),
        (("engine=stream",), max),
    ],
    ids=["tuned", "reference", "stream"],
)
def test_a_cpu_reads_while_it_computes_with_threads_of_its_own(make_plan, machine, overrides, expected):
    """DeepSpeed waits for what it reads; `stream` has threads that read on."""

    def step_s(disk_bytes_per_s):
        ceilings = replace(ENDLESS_RATES, hbm_bytes_per_s=1e10, disk_bytes_per_s=disk_bytes_per_s)
        known = replace(INSTANT, gemm_flops={"bfloat16": {1: 1e11}})
        on = machine("cpu", ceilings=ceilings, calibration=known)
        plan = make_plan("model=opt-1.3b", "offload=nvme", "quant=fp16", *overrides, on=on)
        return predict(plan).decode_step_s, plan.placement.nvme_bytes

    work, on_disk = step_s(ENDLESS)
    for rate in (1e8, 1e11):
        assert step_s(rate)[0] == near(expected(on_disk / rate, work))


def test_a_stall_is_added_for_every_layer(planned):
    known = {"layer_s": 1e-3}
    plan = planned("offload=cpu", known=known, overlap={"stall": 1.6}, link_bytes_per_s=50e9)

    assert predict(plan).decode_step_s == near(STREAMED / 50e9 + 1.6 * LAYERS * 1e-3)


# --- the whole ------------------------------------------------------------------------------------------------------


def test_generated_tokens_over_prefill_and_decode(make_plan, machine):
    plan = make_plan("model=opt-13b", "workload=zero-inference", "workload.gen_len=5", on=machine("measured"))
    got = predict(plan)

    assert got.total_tok_per_s == near(8 * 5 / (got.prefill_s + 4 * got.decode_step_s))
    assert got.prefill_s > got.decode_step_s


def test_a_price_makes_a_cost_of_the_predicted_time(make_plan, machine):
    plan = make_plan("model=opt-13b", "hardware.price_per_hour=7.2", on=machine("measured"))
    got = predict(plan)

    assert got.cost_per_million_tokens == near(7.2 / 3600 * 1e6 / got.total_tok_per_s)


def test_micro_batches_are_generated_tokens_too(make_plan, machine):
    plan = make_plan(
        *("model=opt-13b", "engine=stream", "workload.batch_size=4", "workload.micro_batches=3", "workload.gen_len=1"),
        on=machine("measured"),
    )
    got = predict(plan)

    assert got.total_tok_per_s == near(12 / got.prefill_s)


def test_predictions_take_the_mean_of_what_bounds_take_the_best_of(planned):
    """Of two moments, of which one is three times as fast: half-way by the time that each takes."""
    known = {"moments": {"link_bytes_per_s": [50e9, 150e9]}}
    plan = planned("offload=cpu", known=known, link_bytes_per_s=150e9)

    assert predict(plan).decode_step_s == near(STREAMED / 75e9)
    assert lower_bound(plan).decode_step_s == near(STREAMED / 150e9)


def test_a_bound_takes_the_arithmetic_of_its_own_type(planned):
    """A processor may multiply bfloat16 several times as fast as float16."""
    known = {"moments": {"float16": [1e10, 2e10], "bfloat16": [9e10]}, "gemm_flops": {"float16": {8: 1.5e10}}}
    plan = planned("offload=none", known=known, flops=9e10)

    assert plan.dtype == "float16"
    assert lower_bound(plan).decode_step_s == near(2 * MATRICES * 8 / 2e10)


NOTHING = module.Prediction(**dict.fromkeys(module.Prediction.__dataclass_fields__))


def test_nothing_is_predicted_of_a_machine_that_was_not_measured(make_plan, machine):
    """With a vendor's rates a prediction would be the bound again, under another name."""
    plan = make_plan("model=opt-13b", "offload=nvme", on=machine("h200"))

    assert lower_bound(plan).decode_step_s
    assert predict(plan) == NOTHING


@pytest.mark.parametrize(
    ("missing", "overrides"),
    [
        ("link_bytes_per_s", ("offload=cpu",)),
        ("link_pageable_bytes_per_s", ("offload=cpu", "offload.pin_memory=false")),
        ("disk_bytes_per_s", ("offload=nvme",)),
        ("hbm_bytes_per_s", ("offload=none",)),
        ("gemm_flops", ("offload=none",)),
        ("layer_s", ("offload=none",)),
        ("step_s", ("offload=none",)),
    ],
)
def test_an_unknown_rate_is_not_an_endless_one(make_plan, machine, missing, overrides):
    on = machine("measured")
    if missing in vars(on.ceilings):
        without = replace(on, ceilings=replace(on.ceilings, **{missing: None}))
    else:
        nothing = {} if missing == "gemm_flops" else None
        without = replace(on, calibration=replace(on.calibration, **{missing: nothing}))
    known, unknown = (predict(make_plan("model=opt-13b", *overrides, on=where)) for where in (on, without))

    assert known.decode_step_s
    assert known.prefill_s
    assert known.load_s == unknown.load_s > 0
    assert unknown == replace(NOTHING, load_s=known.load_s)


@pytest.mark.parametrize("missing", ["link_bytes_per_s", "link_pageable_bytes_per_s", "disk_bytes_per_s"])
def test_a_rate_that_nothing_depends_on_need_not_be_known(make_plan, machine, missing):
    on = machine("measured")
    kept = on.ceilings if missing in vars(on.ceilings) else on.calibration
    without = replace(kept, **{missing: None})
    where = replace(on, ceilings=without) if kept is on.ceilings else replace(on, calibration=without)
    here, there = (predict(make_plan("model=opt-13b", "offload=none", on=each)) for each in (on, where))

    assert here == there
    assert here.decode_step_s


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # pinned page by page, or copied; all of it at 4 or 20 GB/s
        (("offload=cpu",), STREAMED / 4e9),
        (("offload=cpu", "offload.pin_memory=false"), STREAMED / 20e9),
        (("offload=none",), 0.0),
    ],
    ids=str,
)
def test_loading_makes_the_weights_and_puts_them_where_they_stay(planned, overrides, expected):
    known = {"pin_bytes_per_s": 4e9, "host_bytes_per_s": 20e9, "disk_write_bytes_per_s": 2e9}
    plan = planned(*overrides, known=known, overlap={"load_s": 3.0, "load_s_per_parameter": 1e-9})

    assert predict(plan).load_s == near(3.0 + 12.85347328 + expected)


def test_quantizing_takes_its_time_while_loading(planned):
    known = {"pin_bytes_per_s": 4e9}
    plan = planned("offload=none", "quant=int4", known=known, overlap={"load_s_per_quantized": 1e-9})
    quantized = sum(p.numel for p in plan.architecture.parameters if plan.is_quantized(p))

    assert 12e9 < quantized < plan.architecture.num_parameters
    assert predict(plan).load_s == near(quantized * 1e-9)
    assert predict(planned("offload=none", known=known, overlap={"load_s_per_quantized": 1e-9})).load_s == 0


def test_a_processor_makes_random_weights_in_one_thread(planned):
    plan = planned("offload=cpu", name="cpu", known={})
    weights = replace(plan.run.weights, source=WeightSource.pretrained)
    pretrained = replace(plan, run=replace(plan.run, weights=weights))

    assert predict(plan).load_s - predict(pretrained).load_s == near(12_853_473_280 * 5e-9)


def test_a_processor_takes_longer_to_quantize_than_to_leave_a_weight_as_it_is(planned):
    plain, quantized = (planned("offload=cpu", quant, name="cpu", known={}) for quant in ("quant=fp16", "quant=int4"))
    count = sum(p.numel for p in quantized.architecture.parameters if quantized.is_quantized(p))

    assert predict(quantized).load_s - predict(plain).load_s == near(count * 3e-9)


def test_an_engine_may_pin_several_blocks_at_a_time(planned):
    known = {"pin_bytes_per_s": 4e9, "host_bytes_per_s": 20e9}
    for overrides, rate in (("offload=cpu",), 8e9), (("offload=cpu", "offload.pin_memory=false"), 20e9):
        assert predict(planned(*overrides, known=known, overlap={"pinning": 2.0})).load_s == near(STREAMED / rate)


def test_loading_to_a_disk_writes_there_and_fills_the_buffers(planned):
    known = {"pin_bytes_per_s": 4e9, "host_bytes_per_s": 20e9, "disk_write_bytes_per_s": 2e9}
    plan = planned("offload=nvme", known=known)

    assert predict(plan).load_s == near(STREAMED / 2e9 + 15 * 2 * HEAD / 4e9)


def test_nothing_that_is_predicted_is_infinite(make_plan, machine):
    for overrides in (("offload=cpu",), ("offload=nvme",), ("offload=none", "engine=stream", "kv_cache=cpu")):
        got = predict(make_plan("model=opt-13b", *overrides, on=machine("measured")))
        assert 0 < got.decode_step_s < inf
        assert 0 < got.prefill_s < inf
        assert 0 < got.load_s < inf
