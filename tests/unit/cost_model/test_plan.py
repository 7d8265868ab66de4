import re
from dataclasses import replace
from math import ceil

import pytest
import tiny
import torch
from crossed import crossed
from transformers import AutoConfig, AutoModelForCausalLM

from zi_experiments.config.schema import Ceilings, ConfigError
from zi_experiments.cost_model.bound import lower_bound
from zi_experiments.cost_model.spec import Spec
from zi_experiments.engines.deepspeed import placement
from zi_experiments.models import description
from zi_experiments.planner import planning
from zi_experiments.results import explanation

GIB = 1 << 30
BIG = {"gpu_memory_bytes": 1000 * GIB, "host_memory_bytes": 4000 * GIB}
OFFLOADS, QUANTS, PROFILES = ("none", "cpu", "nvme"), ("fp16", "int4", "int8"), ("tuned", "reference")


# --- what is stored -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "numel"),
    [
        (["quant=fp16"], 768 * 3072),
        # 4 bits are a quarter of 16; one scale and one minimum for every 64 weights
        (["quant=int4"], 768 * 3072 // 4 + 2 * 36864),
        (["quant=int8"], 768 * 3072 // 2 + 2 * 36864),
        (["quant=int4", "quant.group_size=32"], 768 * 3072 // 4 + 2 * 73728),
    ],
    ids=str,
)
def test_stored_size_of_a_matrix(make_plan, overrides, numel):
    plan = make_plan("model=opt-125m", *overrides)
    fc1 = next(p for p in plan.architecture.parameters if p.name.endswith("layers.0.fc1.weight"))

    assert fc1.shape == (3072, 768)
    assert plan.stored_numel(fc1) == numel


@pytest.mark.parametrize(("quant", "bits"), [("int4", 4.5), ("int8", 8.5)])
def test_stored_size_of_stacked_experts(plan_of, quant, bits):
    plan = plan_of("mixtral-8x7b", "cpu", quant)
    experts = next(p for p in plan.architecture.parameters if p.name.endswith("layers.0.mlp.experts.gate_up_proj"))

    assert experts.shape == (8, 2 * 14336, 4096)
    assert plan.stored_numel(experts) == 8 * 2 * 14336 * 4096 * bits / 16


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("opt-125m", "layers.0.fc1.bias"),
        ("opt-125m", "final_layer_norm.weight"),
        ("mixtral-8x7b", "layers.0.mlp.gate.weight"),
    ],
)
def test_norms_biases_and_routers_stay_16_bit(plan_of, model, name):
    plan = plan_of(model, "cpu", "int4")
    parameter = next(p for p in plan.architecture.parameters if p.name.endswith(name))

    assert plan.stored_numel(parameter) == parameter.numel


def test_weight_bytes_of_opt_125m_in_int4(make_plan):
    plan = make_plan("model=opt-125m", "quant=int4")
    matrices = 50272 * 768 + 12 * 12 * 768 * 768
    positions, per_layer, final = 2050 * 768, 13 * 768, 2 * 768

    assert plan.weight_bytes == 2 * (matrices // 4 + matrices // 32 + positions + 12 * per_layer + final)


def test_weight_bytes_of_opt_175b_are_98_gb_in_int4(plan_of):
    assert plan_of("opt-175b", "cpu", "int4").weight_bytes == pytest.approx(98e9, rel=0.01)
    assert plan_of("opt-175b", "cpu", "fp16").weight_bytes == 2 * 174_604_468_224


def test_share_of_the_parameters_that_is_quantized(plan_of):
    assert plan_of("opt-175b", "cpu", "int4").quantized_fraction > 0.99
    assert plan_of("opt-175b", "cpu", "fp16").quantized_fraction == 0
    assert plan_of("mixtral-8x7b", "cpu", "int4").quantized_fraction > 0.99


@pytest.mark.parametrize(
    ("quant", "bits"),
    [
        ("fp16", 16),
        ("int4", 4.5),  # a 16-bit scale and minimum for 64 weights: half a bit each
        ("int8", 8.5),
        ("int4-g32", 5),
        ("int4-g128", 4.25),
    ],
)
def test_bits_of_a_weight_as_stored(plan_of, quant, bits):
    assert plan_of("opt-175b", "cpu", quant).bits_per_weight == pytest.approx(bits, rel=1e-3)
    assert plan_of("mixtral-8x7b", "cpu", quant).bits_per_weight == pytest.approx(bits, rel=1e-3)


def test_bits_of_a_weight_count_what_stays_16_bit(make_plan):
    plan = make_plan("model=opt-125m", "quant=int4")

    vectors, positions = 12 * 13 * 768 + 2 * 768, 2050 * 768
    matrices = plan.architecture.num_parameters - vectors - positions
    stored = 4.5 * matrices + 16 * (vectors + positions)
    assert plan.bits_per_weight == pytest.approx(stored / plan.architecture.num_parameters)


def test_what_is_expanded_at_once_is_a_stack_of_experts(plan_of):
    assert plan_of("mixtral-8x7b", "cpu", "int4").expanded_bytes == 2 * 8 * 2 * 14336 * 4096
    assert plan_of("mixtral-8x7b", "cpu", "fp16").expanded_bytes == 0


def test_keys_and_values_at_full_length(make_plan):
    plan = make_plan("model=llama-2-70b", "workload.batch_size=3", "workload.prompt_len=100", "workload.gen_len=20")

    assert plan.kv_cache_bytes == 2 * 3 * 120 * (2 * 80 * 8 * 128)


# --- where it is stored ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "offload", "quant", "profile", "ranks"),
    crossed(("opt-125m", "opt-13b", "bloom-176b", "mixtral-8x7b"), OFFLOADS, QUANTS, PROFILES, (1, 4)),
)
def test_placement_sums_to_the_weights(plan_of, machine, model, offload, quant, profile, ranks):
    plan = plan_of(model, offload, quant, profile, ranks=ranks, on=machine(**BIG))
    place = plan.placement

    assert min(place.gpu_bytes, place.cpu_bytes, place.nvme_bytes) >= 0
    assert place.gpu_bytes + place.cpu_bytes + place.nvme_bytes == plan.weight_bytes


def test_without_offload_everything_is_on_the_device(plan_of, machine):
    on_gpu, on_cpu = plan_of("opt-125m", "none"), plan_of("opt-125m", "none", on=machine("cpu"))

    assert on_gpu.placement.gpu_bytes == on_gpu.weight_bytes
    assert on_cpu.placement.cpu_bytes == on_cpu.weight_bytes
    assert on_gpu.streamed_bytes_per_pass == on_cpu.streamed_bytes_per_pass == 0


@pytest.mark.parametrize(
    ("profile", "vectors_on_gpu"),
    [
        ("tuned", 40 * 13 + 2),  # all norms and biases: 13 h a layer and 2 h after the last
        ("reference", 40 * 9 + 2),  # those of at most h: fc1's bias has 4 h
    ],
)
def test_small_parameters_stay_on_the_gpu(plan_of, profile, vectors_on_gpu):
    plan = plan_of("opt-13b", "cpu", "fp16", profile)

    assert plan.placement.gpu_bytes == 2 * 5120 * vectors_on_gpu
    assert plan.streamed_bytes_per_pass == plan.placement.cpu_bytes == plan.weight_bytes - plan.placement.gpu_bytes


def test_every_offloaded_byte_crosses_the_link(plan_of):
    plan = plan_of("opt-175b", "nvme", "fp16")

    assert plan.placement.nvme_bytes > 0.99 * plan.weight_bytes
    assert plan.streamed_bytes_per_pass == plan.placement.nvme_bytes + plan.placement.cpu_bytes


@pytest.mark.parametrize(
    ("quant", "profile", "ranks", "names"),
    [
        # fc1 in 16-bit is 4.7 MB, an attention matrix 1.2 MB; in INT4 1.3 MB and 0.3 MB
        (
            "fp16",
            "tuned",
            1,
            {"fc1", "fc2", "q_proj", "k_proj", "v_proj", "out_proj", "embed_tokens", "embed_positions"},
        ),
        ("fp16", "tuned", 4, {"fc1", "fc2", "embed_tokens"}),
        ("int4", "tuned", 1, {"fc1", "fc2", "embed_tokens", "embed_positions"}),
        ("fp16", "reference", 1, {"embed_tokens"}),  # its blocks are 16 MiB
        ("int4", "reference", 2, set()),
    ],
)
def test_a_partition_below_a_block_or_1_mib_is_not_on_disk(plan_of, quant, profile, ranks, names):
    plan = plan_of("opt-125m", "nvme", quant, profile, ranks=ranks)

    assert {p.name.split(".")[-2] for p in placement.swapped(plan)} == names
    assert plan.placement.nvme_bytes == 2 * sum(plan.stored_numel(p) for p in placement.swapped(plan))


def test_larger_blocks_leave_more_in_memory(make_plan):
    small, large = (
        make_plan("offload=nvme", "quant=fp16", f"offload.aio.block_size={4 * size}") for size in (1 << 18, 1 << 20)
    )

    assert large.placement.nvme_bytes < small.placement.nvme_bytes
    assert large.placement.cpu_bytes > small.placement.cpu_bytes


def test_a_tied_head_takes_no_room_on_disk(plan_of):
    plan = plan_of("opt-125m", "nvme", "fp16")

    assert plan.placement.nvme_bytes == 2 * (50272 * 768 + 2050 * 768 + 12 * 12 * 768**2)


# --- buffers and layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "quant", "profile", "ranks"),
    crossed(("opt-125m", "opt-175b", "bloom-176b", "qwen3-235b-a22b"), QUANTS, PROFILES, (1, 4)),
)
def test_every_partition_on_disk_fits_into_a_buffer(plan_of, machine, model, quant, profile, ranks):
    plan = plan_of(model, "nvme", quant, profile, ranks=ranks, on=machine(**BIG))

    assert all(ceil(plan.stored_numel(p) / ranks) <= placement.buffer_numel(plan) for p in placement.swapped(plan))


def test_tuned_buffers_hold_two_layers_and_the_rest(plan_of):
    plan = plan_of("opt-175b", "nvme", "int4")

    assert placement.buffer_count(plan) == 2 * 6 + 2 + 1  # q, k, v, out, fc1, fc2; tokens and positions; one more
    assert placement.buffer_numel(plan) == 50272 * 12288 * 9 // 32  # the embedding, in INT4 with groups of 64
    assert placement.buffer_bytes_host(plan) == placement.buffer_count(plan) * placement.buffer_numel(plan) * 2


def test_buffers_of_the_user_s_own(make_plan):
    plan = make_plan("offload=nvme", "offload.buffer_count=7", "offload.buffer_size=80000000")

    assert (placement.buffer_count(plan), placement.buffer_numel(plan)) == (7, 80_000_000)


def test_buffers_take_no_host_memory_with_gpudirect_storage(make_plan):
    assert placement.buffer_bytes_host(make_plan("offload=nvme", "offload.use_gds=true")) == 0


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_buffers_of_more_ranks_hold_their_shares(plan_of, ranks):
    plan = plan_of("opt-175b", "nvme", "fp16", ranks=ranks)

    assert placement.buffer_numel(plan) == 50272 * 12288 // ranks
    assert placement.buffer_bytes_host(plan) == placement.buffer_count(plan) * placement.buffer_numel(plan) * 2 * ranks


@pytest.mark.parametrize(("gpu_gb", "layers"), [(150, 4), (9.5, 3), (7, 2)])
def test_more_layers_are_live_where_there_is_room(make_plan, machine, gpu_gb, layers):
    """An OPT-30B layer takes 1.23 GB, and the rest of the model 0.75 GB; half of the room beside that is for layers."""
    on = machine(gpu_memory_bytes=int(gpu_gb * 1e9))

    assert placement.live_layers(make_plan("model=opt-30b", "quant=fp16", "offload=cpu", on=on)) == layers


# --- the bound ------------------------------------------------------------------------------------------------------

# OPT-13B in 16-bit: 12 853 473 280 parameters, of which 12·5120² in each of 40 layers' matrices and 40·13·5120 + 2·5120
# in vectors, which stay on the GPU. Keys and values: 2·40·5120 elements a token.
WEIGHTS = 2 * 12_853_473_280
STREAMED = WEIGHTS - 2 * (40 * 13 * 5120 + 2 * 5120)
MATRICES = 40 * 12 * 5120**2
KV_PER_TOKEN = 2 * 2 * 40 * 5120


def opt_13b(make_plan, *overrides, on=None):
    work = ["workload.batch_size=8", "workload.prompt_len=512", "workload.gen_len=32"]
    return make_plan("model=opt-13b", "quant=fp16", *work, *overrides, on=on)


def test_offloaded_weights_are_bound_by_the_link(make_plan):
    bound = lower_bound(opt_13b(make_plan, "offload=cpu"))

    assert bound.limited_by == "link"
    assert bound.decode_step_s == pytest.approx(STREAMED / 63e9)
    assert bound.decode_step_s == pytest.approx(0.408, rel=1e-3)
    assert bound.prefill_s == bound.decode_step_s


@pytest.mark.parametrize(
    ("resident", "slots"),
    [("0", 3), ("auto", 2)],
)
def test_what_a_ring_has_brought_ahead_need_not_come_in_a_prefill(make_plan, machine, resident, slots):
    """A prompt of one token takes no time to compute: the last pass left as many layers as there are slots."""
    work = ("engine=stream", "workload.batch_size=1", "workload.prompt_len=1", f"offload.resident={resident}")
    on = machine(gpu_memory_bytes=8 * 10**9)
    bound = lower_bound(plan := opt_13b(make_plan, *work, "offload=cpu", on=on))
    slab = plan.streamed_bytes_per_pass / 40

    assert bound.decode_step_s == pytest.approx(40 * slab / 63e9)
    assert bound.prefill_s == pytest.approx((40 - slots) * slab / 63e9, rel=0.01)

    from_disk = lower_bound(opt_13b(make_plan, *work, "offload=nvme", "hardware.host_memory_gib=20", on=on))
    assert from_disk.prefill_s < from_disk.decode_step_s

    routed = make_plan("model=mixtral-8x7b", "quant=int4", *work, "offload=cpu", on=machine())
    assert (routed.storage.routes, routed.storage.ready_bytes) == (True, 0), "the ring stands still between prompts"


def test_resident_weights_are_bound_by_hbm(make_plan):
    bound = lower_bound(opt_13b(make_plan, "offload=none"))

    assert bound.limited_by == "hbm"
    layers = 2 * 40 * 12 * 5120**2  # bytes of the matrices that a token meets; of the embedding it reads one row
    assert bound.decode_step_s == pytest.approx((layers + 8 * 512 * KV_PER_TOKEN) / 4.8e12)


def test_weights_on_disk_are_bound_by_the_disk(make_plan):
    plan = opt_13b(make_plan, "offload=nvme")

    assert lower_bound(plan).limited_by == "disk"
    assert plan.placement.nvme_bytes == STREAMED  # every matrix of this model is larger than 1 MiB
    assert lower_bound(plan).decode_step_s == pytest.approx(STREAMED / 2.4e9)


def test_a_disk_faster_than_the_link_is_not_the_limit(make_plan, machine):
    fast = machine(ceilings=Ceilings(63e9, 4.8e12, 989e12, 100e9, None, "by hand"))

    assert lower_bound(opt_13b(make_plan, "offload=nvme", on=fast)).limited_by == "link"


def test_many_short_sequences_are_bound_by_arithmetic(make_plan):
    batch = ["workload.batch_size=4096", "workload.prompt_len=1", "workload.gen_len=2"]
    bound = lower_bound(opt_13b(make_plan, "offload=none", *batch))

    assert bound.limited_by == "gemm"
    assert bound.decode_step_s == pytest.approx(2 * MATRICES * 4096 / 989e12)


def test_a_large_prefill_is_bound_by_arithmetic(make_plan):
    bound = lower_bound(opt_13b(make_plan, "offload=cpu", "workload.batch_size=64"))

    attention = 2 * 64 * 512**2 * 5120 * 40
    assert bound.limited_by == "link"  # a decode step still is
    assert bound.prefill_s == pytest.approx((2 * MATRICES * 64 * 512 + attention) / 989e12)


def test_int4_lowers_the_link_bound_by_its_stored_size(plan_of):
    int4, fp16 = plan_of("opt-13b", "cpu", "int4"), plan_of("opt-13b", "cpu", "fp16")

    assert lower_bound(fp16).decode_step_s / lower_bound(int4).decode_step_s == pytest.approx(32 / 9, rel=0.01)


def test_more_ranks_have_more_links(plan_of):
    one, four = (lower_bound(plan_of("opt-13b", "cpu", "fp16", ranks=ranks)) for ranks in (1, 4))

    assert four.decode_step_s == pytest.approx(one.decode_step_s / 4)


def test_more_ranks_share_one_disk(plan_of):
    one, two = (lower_bound(plan_of("opt-13b", "nvme", "fp16", ranks=ranks)) for ranks in (1, 2))

    assert two.decode_step_s == one.decode_step_s


def test_routed_experts_compute_for_their_tokens_only(make_plan):
    batch = ["workload.batch_size=4096", "workload.prompt_len=1", "workload.gen_len=2"]
    bound = lower_bound(make_plan("model=mixtral-8x7b", "quant=fp16", "offload=none", *batch))

    attention, router, expert = 2 * 4096**2 + 2 * 4096 * 1024, 8 * 4096, 3 * 4096 * 14336
    assert bound.limited_by == "gemm"
    assert bound.decode_step_s == pytest.approx(2 * 32 * (attention + router + 2 * expert) * 4096 / 989e12)


# Billions of parameters that a token uses, as published, and how many of the tables of tokens that counts: embedding, head
USED = {
    "deepseek-v3": (37, 2),
    "glm-4.5-air": (12, 0),
    "glm-4.6": (32, 0),
    "gpt-oss-20b": (3.61, 1),
    "gpt-oss-120b": (5.13, 1),
    "kimi-k2": (32, 1),
    "llama-4-scout": (17, 2),
    "minimax-m2": (10, 0),
    "mixtral-8x7b": (12.9, 2),
    "mixtral-8x22b": (39, 2),
    "qwen3-30b-a3b": (3.3, 2),
    "qwen3-235b-a22b": (22, 2),
}


@pytest.mark.parametrize("model", USED)
def test_a_token_uses_as_many_parameters_as_published(make_plan, machine, model):
    plan = make_plan(f"model={model}", on=machine(**BIG))
    published, tables = USED[model]

    found = (
        plan.active(lambda p: p.numel) + tables * plan.architecture.config.vocab_size * plan.architecture.hidden_size
    )

    assert found / 1e9 == pytest.approx(published, rel=0.025)


EXPERTS = tiny.GROUPED | {"num_hidden_layers": 2, "head_dim": 8, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("family", "numbers"),
    [
        ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 3}),
        ("aria_text", {"moe_num_experts": 8, "moe_topk": 3}),
        ("hunyuan_v1_moe", {"num_experts": 8, "moe_topk": [4, 3]}),
        (
            "gemma4_text",
            tiny.FAMILIES["gemma4_text"] | {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 3},
        ),
    ],
)
def test_a_token_is_routed_to_as_many_experts_as_its_model_says(compose_run, machine, monkeypatch, family, numbers):
    """Whatever the name in the configuration: as many as its routers choose."""
    config = AutoConfig.for_model(family, **EXPERTS | numbers)
    model, routed, topk = AutoModelForCausalLM.from_config(config), [], torch.topk
    with monkeypatch.context() as watched:
        watched.setattr(torch, "topk", lambda *args, **kwargs: (routed.append(topk(*args, **kwargs)), routed[-1])[1])
        model(tiny.prompts(1, 5))
    run = compose_run("quant=fp16")
    spec = Spec(run=run, architecture=description.describe(config, family), machine=machine(), dtype="float16")

    assert spec.routed_experts == min(chosen.indices.shape[-1] for chosen in routed) == 3


@pytest.mark.parametrize(
    ("offload", "missing"),
    [("cpu", "link_bytes_per_s"), ("nvme", "disk_bytes_per_s"), ("none", "hbm_bytes_per_s"), ("none", "flops")],
)
def test_an_unknown_rate_leaves_no_bound_to_what_depends_on_it(make_plan, machine, offload, missing):
    """All others being known, it would seem endless."""
    on = machine("measured")
    bound = lower_bound(
        opt_13b(make_plan, f"offload={offload}", on=replace(on, ceilings=replace(on.ceilings, **{missing: None})))
    )

    assert bound.unknown == (missing,)
    assert (bound.decode_step_s, bound.limited_by) == (None, None)
    assert (bound.prefill_s, bound.prefill_limited_by) == (None, None)


def test_a_prompt_of_few_tokens_takes_as_long_as_its_weights_are_read(make_plan):
    plan = opt_13b(make_plan, "offload=none", "workload.batch_size=1", "workload.prompt_len=2")

    assert lower_bound(plan).prefill_limited_by == "hbm"
    assert lower_bound(plan).prefill_s == pytest.approx(lower_bound(plan).decode_step_s, rel=0.01)


@pytest.mark.parametrize(("name", "offload"), [("measured", "none"), ("cpu", "cpu")])
def test_a_rate_of_what_nothing_crosses_need_not_be_known(make_plan, machine, name, offload):
    """There is no link to a CPU, and no disk."""
    needed = Ceilings(None, 4e11, 1e12, None, None, "by hand")
    bound = lower_bound(opt_13b(make_plan, f"offload={offload}", on=machine(name, ceilings=needed)))

    assert bound.unknown == ()
    assert bound.decode_step_s
    assert bound.prefill_s


def test_a_bound_by_vendors_rates_says_so(make_plan, machine):
    published = Ceilings(63e9, 4e12, 800e12, 5e9, None, "published by the vendor: dense 16-bit tensor rate")
    by_vendor, by_hand = (
        opt_13b(make_plan, "offload=cpu", on=machine("h200", ceilings=replace(published, source=source)))
        for source in (published.source, "measured on 2026-07-01")
    )

    assert explanation.least(by_vendor, 0.5, "link") == "500.0 ms (vendor's rates)"
    assert explanation.least(by_vendor, 0.5, "disk") == "500.0 ms", "that one was typed"
    assert explanation.least(by_hand, 0.5, "link") == "500.0 ms"


def test_keys_and_values_in_host_memory_cross_the_link_too(make_plan):
    """Of a decode step at least the prompt's; prefill makes them on the GPU."""
    there, away = (opt_13b(make_plan, "offload=cpu", f"kv_cache={device}") for device in ("gpu", "cpu"))
    kv = 8 * 512 * KV_PER_TOKEN

    assert there.link_bytes_per_pass == there.streamed_bytes_per_pass == STREAMED
    assert (away.kv_link_bytes_per_pass, away.link_bytes_per_pass) == (kv, STREAMED + kv)
    assert lower_bound(away).decode_step_s == pytest.approx((STREAMED + kv) / 63e9)
    assert lower_bound(away).prefill_s == lower_bound(there).prefill_s


def test_on_a_cpu_nothing_crosses_a_link(make_plan, machine):
    plan = opt_13b(make_plan, "offload=cpu", "kv_cache=cpu", on=machine("cpu"))

    assert plan.link_bytes_per_pass == 0


def test_micro_batches_are_sequences_of_one_pass(make_plan):
    one, four, large = (
        opt_13b(
            make_plan, "engine=stream", "kv_cache=cpu", f"workload.micro_batches={count}", f"workload.batch_size={size}"
        )
        for count, size in ((1, 8), (4, 8), (1, 32))
    )

    assert four.kv_cache_bytes == large.kv_cache_bytes == 4 * one.kv_cache_bytes
    assert lower_bound(four) == lower_bound(large)
    assert four.streamed_bytes_per_pass == one.streamed_bytes_per_pass, "they go through a layer while it is there"
    assert four.kv_link_bytes_per_pass == 4 * one.kv_link_bytes_per_pass


def test_no_ceiling_no_bound(make_plan, machine):
    bound = lower_bound(opt_13b(make_plan, "offload=cpu", on=machine("cpu")))

    assert (bound.prefill_s, bound.decode_step_s, bound.limited_by) == (None, None, None)


# --- dtype and pinning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "dtypes", "chosen"),
    [
        ("opt-125m", ("float16", "bfloat16"), "float16"),
        ("opt-125m", ("bfloat16",), "bfloat16"),  # a CPU
        ("llama-3.1-8b", ("float16",), "float16"),  # a T4
        ("llama-3.1-8b", ("float16", "bfloat16"), "bfloat16"),
    ],
)
def test_dtype(plan_of, machine, model, dtypes, chosen):
    assert plan_of(model, on=machine(dtypes=dtypes)).dtype == chosen


@pytest.mark.parametrize("model", ["opt-125m", "llama-3.1-8b"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_type_of_the_run_goes_before_the_type_of_the_model(make_plan, model, dtype):
    assert make_plan(f"model={model}", f"dtype={dtype}").dtype == dtype


def test_a_type_that_the_device_does_not_compute_in_is_refused(make_plan, machine):
    with pytest.raises(ConfigError, match=r"dtype=float16 is not a type .* pass dtype=bfloat16, or dtype=null"):
        make_plan("dtype=float16", on=machine("cpu", dtypes=("bfloat16",)))


def test_a_float32_checkpoint_runs_in_the_best_type_of_the_device(make_plan):
    assert make_plan("model.architecture.dtype=float32").dtype == "float16"


@pytest.mark.parametrize(
    ("overrides", "changes", "pinned"),
    [
        (["offload=cpu"], {}, True),
        (["offload=nvme"], {}, True),
        (["offload=none"], {}, False),
        (["offload=cpu", "engine.profile=reference"], {}, False),  # the reference script's default
        (["offload=cpu", "engine.profile=reference", "offload.pin_memory=true"], {}, True),
        (["offload=cpu", "offload.pin_memory=false"], {}, False),
        # OPT-13B takes 25.7 GB, and the process 2.5: with less than a tenth left beside the weights they are not pinned
        # unless asked
        (["offload=cpu"], {"host_memory_bytes": int(28.4e9)}, False),
        (["offload=cpu"], {"host_memory_bytes": int(29.0e9)}, True),
        (["offload=cpu", "offload.pin_memory=true"], {"host_memory_bytes": int(28.4e9)}, True),
        (["offload=cpu"], {"device": "cpu", "gpu_memory_bytes": None}, False),
    ],
    ids=str,
)
def test_pinning(make_plan, machine, overrides, changes, pinned):
    assert make_plan("model=opt-13b", "quant=fp16", *overrides, on=machine(**changes)).pin_memory is pinned


# --- refusals -------------------------------------------------------------------------------------------------------


def test_weights_larger_than_the_gpu_are_refused(refusal, machine):
    message = refusal("model=opt-66b", "quant=fp16", "offload=none", on=machine("h200", gpu_memory_bytes=48 * GIB))

    assert message == (
        "opt-66b needs 133.1 GB on each GPU (131.4 GB weights) and each has 51.5 GB: "
        "pass offload=cpu, or quant=int4, or offload=nvme"
    )


def test_what_does_not_fit_in_host_memory_either_is_not_advised(refusal, machine):
    """OPT-66B takes 131.4 GB in 16 bits, and 37 GB in INT4."""
    small = machine("h200", gpu_memory_bytes=48 * GIB, host_memory_bytes=64 * GIB)
    message = refusal("model=opt-66b", "quant=fp16", "offload=none", on=small)

    assert message.partition(": pass ")[2] == "quant=int4, or offload=nvme, or hardware.num_gpus=4"


def test_where_no_one_change_is_enough_two_are_named(refusal, machine):
    """OPT-175B in INT4 takes 98 GB: neither of the GPU nor of the host."""
    small = machine("h200", gpu_memory_bytes=48 * GIB, host_memory_bytes=64 * GIB, gpus_visible=1)
    message = refusal("model=opt-175b", "quant=fp16", "offload=cpu", "engine=stream", on=small)

    ways = message.partition(": pass ")[2].split(", or ")
    assert ways
    assert all(len(way.split()) == 2 for way in ways) or ways == ["offload=nvme"]


def test_more_gpus_are_advised_where_there_are_more(refusal, machine):
    """OPT-13B in INT8 takes 14 GB: too much for one of these GPUs, and not for two."""
    overrides = ["model=opt-13b", "quant=int8", "offload=none", "workload.batch_size=4", "verify=off"]
    card, tight = {"gpu_memory_bytes": 14 * 10**9}, {"host_memory_bytes": 10 * 10**9}

    ways = refusal(*overrides, on=machine(**card, **tight, gpus_visible=2)).partition(": pass ")[2].split(", or ")
    assert "hardware.num_gpus=2" in ways
    assert "hardware.num_gpus=4" not in ways
    assert "num_gpus" not in refusal(*overrides, on=machine(**card, **tight, gpus_visible=1))


def test_where_nothing_helps_a_smaller_model_is_what_is_left(make_plan, machine):
    tiny_card = machine(gpu_memory_bytes=10**9, host_memory_bytes=10**9)

    with pytest.raises(ConfigError, match=r": pass model=… of a smaller one$"):
        make_plan("model=opt-175b", on=tiny_card)


def test_two_gpus_hold_what_one_cannot(make_plan, machine):
    card = machine(gpu_memory_bytes=80 * GIB)
    overrides = ["model=opt-66b", "quant=fp16", "offload=none"]

    with pytest.raises(ConfigError):
        make_plan(*overrides, on=card)
    make_plan(*overrides, "hardware.num_gpus=2", on=card)


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_the_experts_that_are_expanded_at_once_count_as_gpu_memory(make_plan, machine, offload):
    """Those of a Mixtral layer take 1.9 GB in 16 bits beside its weights."""
    overrides = ["model=mixtral-8x7b", f"offload={offload}", "quant=int4", "verify=off"]
    roomy = make_plan(*overrides)
    weights = roomy.placement.gpu_bytes + (0 if offload == "none" else 2 * roomy.layer_numel * 2)
    beside = roomy.kv_cache_bytes + roomy.workspace_bytes + roomy.context_bytes
    needed = weights + 2 * 8 * 2 * 14336 * 4096 + beside

    make_plan(*overrides, on=machine(gpu_memory_bytes=needed))
    with pytest.raises(ConfigError, match="on each GPU"):
        make_plan(*overrides, on=machine(gpu_memory_bytes=needed - 1))


def test_weights_larger_than_host_memory_are_refused(refusal, machine):
    message = refusal("model=opt-175b", "quant=fp16", "offload=cpu", on=machine(host_memory_bytes=128_000_000_000))

    assert message == (
        "opt-175b needs 351.7 GB of host memory (349.2 GB weights) and 128.0 GB are available: "
        "pass quant=int4, or offload=nvme"
    )


def test_weights_larger_than_a_cpu_s_memory_are_refused(refusal, machine):
    refusal("model=opt-13b", "quant=fp16", "offload=none", on=machine("cpu", host_memory_bytes=16 * GIB))


def test_buffers_count_as_host_memory(make_plan, machine):
    """OPT-175B is on disk, what is read ahead of it in 16-bit takes 18.5 GB, and the process 2.5 GB."""
    overrides = ["model=opt-175b", "quant=fp16", "offload=nvme"]
    needed = (2 * 6 + 2 + 1) * 50272 * 12288 * 2 + 2_500_000_000

    make_plan(*overrides, on=machine(host_memory_bytes=needed))
    with pytest.raises(
        ConfigError, match=r"^opt-175b needs 21\.0 GB of host memory \(18\.5 GB buffers, 2\.5 GB processes\)"
    ):
        make_plan(*overrides, on=machine(host_memory_bytes=needed - 1))


def test_buffers_larger_than_host_memory_have_a_way_out(refusal, machine):
    """The reference's buffers of BLOOM take 97 GB, whatever the size of the model and its bits."""
    overrides = ["model=bloom-560m", "quant=fp16", "offload=nvme", "engine.profile=reference"]

    refusal(*overrides, on=machine(host_memory_bytes=64 * GIB))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_too_large_a_batch_is_refused(refusal, make_plan, machine, offload, ranks):
    card = machine(gpu_memory_bytes=48 * GIB)
    overrides = ["model=opt-13b", "quant=fp16", f"offload={offload}", "workload=zero-inference"]
    message = refusal(*overrides, "workload.batch_size=1000", f"hardware.num_gpus={ranks}", on=card)

    advised = int(re.search(r": pass workload\.batch_size=(\d+)", message)[1])
    with pytest.raises(ConfigError):  # the advice is the largest batch that fits
        make_plan(*overrides, f"workload.batch_size={advised + ranks}", f"hardware.num_gpus={ranks}", on=card)


LONG_ANSWERS = ("model=opt-13b", "quant=int4", "workload.prompt_len=16", "workload.gen_len=528")  # 446 MB a sequence


def test_keys_and_values_that_are_too_much_for_the_gpu_can_go_to_the_host(refusal, machine):
    """Those of 500 sequences take 223 GB, and 11 GB of them are on the GPU at a time with kv_cache=cpu."""
    message = refusal(*LONG_ANSWERS, "offload=cpu", "workload.batch_size=500", on=machine(gpu_memory_bytes=48 * GIB))

    assert "222.8 GB KV cache" in message
    assert re.search(r": pass workload\.batch_size=\d+, or kv_cache=cpu", message)


def test_one_sequence_too_long_for_the_gpu_is_refused(refusal, machine):
    """Keys and values of one sequence take 17 GB: no batch would be small enough."""
    overrides = ["model=llama-3.1-8b", "offload=cpu", "workload.batch_size=1", "workload.prompt_len=131000"]

    refusal(*overrides, on=machine(gpu_memory_bytes=15 * GIB))


def test_verification_takes_a_layer_and_what_is_outside_of_layers(refusal, make_plan, machine):
    """OPT-13B in INT4: two packed layers and the largest expanded matrix stay there, so that little else fits."""
    reference = 2 * (50272 * 5120 + 2050 * 5120 + 2 * 5120 + 12 * 5120**2 + 13 * 5120)
    tight = ["model=opt-13b", "offload=cpu", "quant=int4", "workload.batch_size=1"]
    plan = make_plan(*tight)
    assert plan.reference_bytes == reference
    context = GIB + GIB // 8
    needed = plan.placement.gpu_bytes + 4 * plan.layer_numel + plan.expanded_bytes + context + reference

    make_plan(*tight, on=machine(gpu_memory_bytes=needed))
    message = refusal(*tight, on=machine(gpu_memory_bytes=needed - 1))

    assert message.startswith("verification needs 1.2 GB for one layer, embeddings and head in 16 bits, beside 2.1 GB")
    assert message.partition(": pass ")[2].split(", or ")[0] == "verify=off"


def test_keys_and_values_in_host_memory_take_little_of_the_gpu(make_plan, machine):
    card = machine(gpu_memory_bytes=48 * GIB)

    make_plan(*LONG_ANSWERS, "workload.batch_size=1000", "kv_cache=cpu", on=card)
    with pytest.raises(ConfigError, match=r"445\.6 GB KV cache"):
        make_plan(*LONG_ANSWERS, "workload.batch_size=1000", "kv_cache=gpu", on=card)


@pytest.mark.parametrize(("prompt", "gen"), [(2041, 8), (5000, 8), (2048, 1), (1, 2048), (100, 3000)])
def test_more_tokens_than_positions_are_refused(refusal, prompt, gen, machine):
    message = refusal(f"workload.prompt_len={prompt}", f"workload.gen_len={gen}", on=machine())

    assert f"workload.prompt_len={prompt} and workload.gen_len={gen} exceed the 2048 positions of opt-125m" in message


def test_more_experts_for_a_token_than_there_are_are_refused(refusal, machine):
    key = "model.architecture.num_experts_per_tok"  # `refusal` tries out what it says to pass

    message = refusal("model=mixtral-8x7b", "quant=int4", f"{key}=9", on=machine(host_memory_bytes=100 * GIB))

    assert message == f"mixtral-8x7b routes each token to 9 of 8 experts: pass {key}=8 or less"


@pytest.mark.parametrize("positions", [2, 3])
def test_what_is_advised_of_few_positions_has_a_prompt(refusal, machine, positions):
    overrides = ("model=llama-2-7b", f"model.architecture.max_position_embeddings={positions}")
    advised = {2: "workload.gen_len=1 workload.prompt_len=1", 3: "workload.gen_len=1 workload.prompt_len=2"}

    assert advised[positions] in refusal(*overrides, on=machine())


@pytest.mark.parametrize("positions", [0, 1])
def test_too_few_positions_for_any_run_are_refused(make_plan, positions):
    said = rf"^llama-2-7b has too few positions \({positions}\) .*: pass model=opt-125m"

    with pytest.raises(ConfigError, match=said):
        make_plan("model=llama-2-7b", f"model.architecture.max_position_embeddings={positions}")


def test_exactly_as_many_tokens_as_positions_are_fine(make_plan):
    make_plan("workload.prompt_len=2040", "workload.gen_len=8")


def test_alibi_has_no_last_position(make_plan):
    make_plan("model=bloom-560m", "workload.prompt_len=10000")


@pytest.mark.parametrize("size", [100, 512])
def test_a_group_that_does_not_divide_is_refused(refusal, machine, size):
    message = refusal("model=opt-125m", f"quant.group_size={size}", on=machine())

    assert f"quant.group_size={size} does not divide the 768 columns of model.decoder.embed_tokens.weight" in message
    assert message.endswith(": pass quant.group_size=32 or quant.group_size=64 or quant.group_size=128")


@pytest.mark.parametrize(
    ("intermediate_size", "dim", "size", "advised"),
    [
        (173 * 64, 1, 128, "quant.group_size=32 or quant.group_size=64"),
        (345 * 32, 1, 64, "quant.group_size=32"),
        (345 * 32, 1, 100, "quant.group_size=32"),
        (345 * 32, 0, 64, "quant.group_size=32"),
    ],
)
def test_a_group_that_is_advised_divides_every_matrix(refusal, machine, intermediate_size, dim, size, advised):
    """A size that divides the one that is named, but not another one, is not advised."""
    overrides = [f"model.architecture.intermediate_size={intermediate_size}", f"quant.group_size={size}"]
    message = refusal("model=llama-2-7b", f"quant.group_dim={dim}", *overrides, on=machine())

    assert message.endswith(f": pass {advised}")


@pytest.mark.parametrize(("hidden", "advised"), [(768, "quant.group_dim=1"), (720, "quant=fp16")])
def test_where_no_group_divides_the_other_dimension_is_advised_or_16_bits(make_plan, hidden, advised):
    shape = [f"model.architecture.{name}={hidden}" for name in ("hidden_size", "word_embed_proj_dim")]
    said = rf"does not divide the 50271 rows of model\.decoder\.embed_tokens\.weight .*: pass {advised}$"

    with pytest.raises(ConfigError, match=said):
        make_plan("model=opt-125m", "model.architecture.vocab_size=50271", "quant.group_dim=0", *shape)


def test_opt_can_be_grouped_by_rows(make_plan):
    """Its positions have two rows more than 2048, which no group divides: they stay 16-bit."""
    make_plan("model=opt-13b", "quant.group_dim=0", "quant.group_size=32")


@pytest.fixture
def plan_tiny(compose_run, machine):
    """`plan_tiny(family, *overrides, number=…)` → the plan of a tiny model of that family with these numbers."""

    def plan_tiny(family, *overrides, **numbers):
        config = AutoConfig.for_model(family, **tiny.FAMILIES[family] | numbers)
        return planning.build(compose_run(*overrides), description.describe(config, family), machine())

    return plan_tiny


# Conv1D stores (inputs, outputs); of experts, each is an (outputs, inputs) matrix of its own in (experts, outputs, inputs).
# GPT-2: c_fc is (128, 96) or (96, 128) and c_proj the reverse. Mixtral: gate_up_proj is (192, 128), down_proj (128, 96).
GPT2 = {"n_embd": 128, "n_inner": 96, "n_positions": 128}
MIXTRAL = {"hidden_size": 128, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("family", "numbers", "dim", "refused"),
    [
        ("gpt2", GPT2, 1, "transformer.h.0.mlp.c_fc.weight"),
        ("gpt2", GPT2, 0, "transformer.h.0.mlp.c_proj.weight"),
        ("mixtral", MIXTRAL, 1, "model.layers.0.mlp.experts.down_proj"),
        ("mixtral", MIXTRAL, 0, None),
    ],
)
def test_a_group_divides_the_matrix_as_it_is_stored(plan_tiny, family, numbers, dim, refused):
    def plan(size):
        return plan_tiny(family, f"quant.group_size={size}", f"quant.group_dim={dim}", **numbers)

    assert plan(32).quantized_fraction > 0.95
    if refused is None:
        assert plan(64).quantized_fraction > 0.95
    else:
        with pytest.raises(ConfigError, match=rf"of {re.escape(refused)} .*: pass quant\.group_size=32$"):
            plan(64)


def test_the_bound_of_experts_counts_those_that_a_token_is_routed_to(make_plan):
    """Mixtral sends a token to 2 of 8 experts: a bound over all of them would not be one."""
    plan = make_plan("model=mixtral-8x7b", "offload=none", "quant=fp16", "workload.batch_size=1")

    assert lower_bound(plan).limited_by == "hbm"
    assert lower_bound(plan).decode_step_s < 0.4 * plan.weight_bytes / 4.8e12


def test_keys_and_values_in_host_memory_are_counted_there(refusal, machine):
    small = machine("h200", host_memory_bytes=400 * 10**9)
    message = refusal(*LONG_ANSWERS, "offload=cpu", "kv_cache=cpu", "workload.batch_size=1000", on=small)

    assert re.search(r"GB of host memory \(445\.6 GB KV cache, .* and 400\.0 GB are available", message)


@pytest.mark.parametrize("setting", [("offload=nvme", "offload.use_gds=true"), ("hardware.memory_gib=10",)])
def test_what_needs_a_gpu_is_refused_on_a_cpu(refusal, machine, setting):
    assert "on the CPU" in refusal("model=opt-125m", *setting, on=machine("cpu"))


@pytest.mark.parametrize(
    ("setting", "advised"),
    [("kv_cache=cpu", "kv_cache=gpu"), ("workload.micro_batches=2", "workload.micro_batches=1")],
)
def test_what_a_model_s_own_cache_cannot_do_is_refused(compose_run, machine, setting, advised):
    """MiniMax takes no cache but its own, whose layers hold states where their attention is linear."""
    arch = description.describe(AutoConfig.for_model("minimax", **tiny.MINIMAX), "tiny")

    with pytest.raises(ConfigError, match=rf"\(minimax\) has a cache of its own, .*: pass {advised}$"):
        planning.build(compose_run("engine=stream", "quant=fp16", setting), arch, machine())
    planning.build(compose_run("engine=stream", "quant=fp16", advised), arch, machine())
