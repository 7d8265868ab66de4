import copy
import json
import re
from collections import Counter
from itertools import product
from math import ceil

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from places import ROOT

from zi_experiments.config.schema import ConfigError
from zi_experiments.engines.deepspeed import ds_config, placement

GOLDEN = ROOT / "tests" / "golden" / "ds_config"
MODELS = ("opt-13b", "opt-175b", "bloom-176b", "llama-2-70b", "mixtral-8x7b")
OFFLOADS, QUANTS, PROFILES = ("none", "cpu", "nvme"), ("fp16", "int4", "int8"), ("tuned", "reference")
NVME = "/mnt/nvme/zi-0123456789ab"
GIB = 1 << 30

HIDDEN = {"opt-13b": 5120, "opt-175b": 12288, "bloom-176b": 14336, "llama-2-70b": 8192, "mixtral-8x7b": 4096}
DTYPE = {"bloom-176b": "bfloat16", "mixtral-8x7b": "bfloat16"}  # the others are float16
LAYER = {
    "opt-13b": "transformers.models.opt.modeling_opt.OPTDecoderLayer",
    "opt-175b": "transformers.models.opt.modeling_opt.OPTDecoderLayer",
    "bloom-176b": "transformers.models.bloom.modeling_bloom.BloomBlock",
    "llama-2-70b": "transformers.models.llama.modeling_llama.LlamaDecoderLayer",
    "mixtral-8x7b": "transformers.models.mixtral.modeling_mixtral.MixtralDecoderLayer",
}


def build(plan):
    return ds_config.build(plan, NVME if plan.run.offload.device.value == "nvme" else None)


@pytest.fixture
def unlimited(machine):
    """An H200 on which everything fits, so that every cell of the matrix has a plan."""
    return machine(gpu_memory_bytes=10**13, host_memory_bytes=10**13)


@pytest.mark.parametrize(("model", "profile"), list(product(MODELS, PROFILES)))
def test_golden(plan_of, request, model, profile):
    """Every change of a setting shows up as a diff. `pytest --update-golden` accepts it."""

    def cell(offload, quant):
        try:
            return build(plan_of(model, offload, quant, profile))
        except ConfigError:
            return None  # it does not fit on an H200

    cells = {f"{offload}-{quant}": cell(offload, quant) for offload, quant in product(OFFLOADS, QUANTS)}
    file = GOLDEN / f"{model}-{profile}.json"
    if request.config.getoption("--update-golden"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(cells, indent=2) + "\n")

    assert cells == json.loads(file.read_text())


def test_there_is_no_golden_file_without_a_test():
    assert {path.stem for path in GOLDEN.iterdir()} == {
        f"{model}-{profile}" for model, profile in product(MODELS, PROFILES)
    }


def reference(model, offload, quant, *, buffers=(5, 2 * GIB), gds=False):
    """What the DeepSpeedExamples script writes, from its source."""
    h = HIDDEN[model]
    zero = {
        "stage": 3,
        "stage3_prefetch_bucket_size": 2 * h * h,
        "stage3_param_persistence_threshold": h,
        "stage3_max_live_parameters": 2 * h * h,
    }
    expected = {
        "fp16": {"enabled": DTYPE.get(model, "float16") == "float16"},
        "bf16": {"enabled": DTYPE.get(model, "float16") == "bfloat16"},
        "zero_optimization": zero,
        "steps_per_print": 2000,
        "train_batch_size": 8,
        "wall_clock_breakdown": False,
    }
    if quant != "fp16":
        expected["weight_quantization"] = {
            "quantized_initialization": {
                "num_bits": {"int4": 4, "int8": 8}[quant],
                "group_size": 64,
                "group_dim": 1,
                "symmetric": False,
            }
        }
    if offload == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    if offload == "nvme":
        zero["offload_param"] = {
            "device": "nvme",
            "pin_memory": False,
            "nvme_path": NVME,
            "buffer_count": buffers[0],
            "buffer_size": buffers[1],
        }
        expected["aio"] = {
            "block_size": 16 * 1024 * 1024,
            "queue_depth": 64,
            "thread_count": 8,
            "use_gds": gds,
            "single_submit": False,
            "overlap_events": True,
        }
    return expected


BUFFERS = {"bloom-176b": (5, 9 * GIB), "mixtral-8x7b": (10, 1 * GIB)}


@pytest.mark.parametrize(("model", "offload", "quant"), list(product(MODELS, OFFLOADS, QUANTS)))
def test_the_reference_profile_is_the_reference_script_s(plan_of, unlimited, model, offload, quant):
    built = build(plan_of(model, offload, quant, "reference", on=unlimited))

    assert built == reference(model, offload, quant, buffers=BUFFERS.get(model, (5, 2 * GIB)))


@pytest.mark.parametrize(
    ("model", "buffers"),
    [("bloom-176b", (3, 8 * GIB)), ("mixtral-8x7b", (10, 1 * GIB)), ("opt-175b", (5, 2 * GIB))],
)
def test_the_reference_profile_with_gpudirect_storage(make_plan, unlimited, model, buffers):
    overrides = ["workload=zero-inference", "quant=int4", "offload=nvme", "engine.profile=reference"]
    built = build(make_plan(f"model={model}", *overrides, "offload.use_gds=true", on=unlimited))

    assert built == reference(model, "nvme", "int4", buffers=buffers, gds=True)


@pytest.mark.parametrize("pinned", [True, False])
def test_the_reference_profile_pins_when_asked(make_plan, pinned):
    built = build(make_plan("engine.profile=reference", f"offload.pin_memory={pinned}"))

    assert built["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": pinned}


# --- the tuned profile ----------------------------------------------------------------------------------------------


def largest_layer(plan):
    layers = Counter()
    for parameter in plan.architecture.parameters:
        if parameter.layer is not None:
            layers[re.search(r"\.(\d+)\.", parameter.name)[1]] += plan.stored_numel(parameter)
    assert len(layers) == plan.architecture.num_layers
    return max(layers.values())


@pytest.mark.parametrize(("model", "offload", "quant"), list(product(MODELS, OFFLOADS, QUANTS)))
def test_the_tuned_profile_fetches_whole_layers(plan_of, unlimited, model, offload, quant):
    plan = plan_of(model, offload, quant, "tuned", on=unlimited)
    zero = build(plan)["zero_optimization"]
    layer = largest_layer(plan)

    assert zero["leaf_module"] == {"classes": [LAYER[model]]}
    assert zero["stage3_prefetch_bucket_size"] >= layer
    assert zero["stage3_max_live_parameters"] >= 2 * layer + plan.outside_numel
    vectors = [p.numel for p in plan.architecture.parameters if len(p.shape) == 1]
    assert zero["stage3_param_persistence_threshold"] >= max(vectors)


def test_the_tuned_profile_keeps_no_matrix_on_the_gpu(plan_of):
    plan = plan_of("opt-13b", "cpu", "int4")
    threshold = build(plan)["zero_optimization"]["stage3_param_persistence_threshold"]

    assert threshold == 4 * 5120  # fc1's bias
    assert all(plan.stored_numel(p) > threshold for p in plan.architecture.parameters if len(p.shape) > 1)


@pytest.mark.parametrize(
    ("model", "quant", "numel"),
    [
        ("opt-13b", "fp16", 12 * 5120**2 + 13 * 5120),
        # attention and the stacked experts in INT4, with a scale and a minimum for every 64; router and norms in 16 bits
        (
            "mixtral-8x7b",
            "int4",
            (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 8 * 4096 * 14336) * 9 // 32 + 8 * 4096 + 2 * 4096,
        ),
    ],
)
def test_a_tuned_bucket_is_one_layer_by_hand(plan_of, model, quant, numel):
    zero = build(plan_of(model, "cpu", quant))["zero_optimization"]

    assert zero["stage3_prefetch_bucket_size"] == numel


def test_tuned_linear_layers_compute_what_those_of_transformers_do(plan_of):
    """DeepSpeed's own, which it uses by default, multiplies first and adds the bias to the rounded product."""
    tuned = build(plan_of("opt-13b"))["zero_optimization"]

    assert tuned["memory_efficient_linear"] is False
    assert DeepSpeedZeroConfig().memory_efficient_linear is True


@pytest.mark.parametrize(("model", "quant"), list(product(MODELS, QUANTS)))
@pytest.mark.parametrize("ranks", [1, 4])
def test_tuned_buffers_are_large_and_many_enough(plan_of, unlimited, model, quant, ranks):
    plan = plan_of(model, "nvme", quant, "tuned", ranks=ranks, on=unlimited)
    built = build(plan)
    offload = built["zero_optimization"]["offload_param"]
    swapped = placement.swapped(plan)
    in_layers = sum(p.layer is not None for p in swapped)

    assert offload["buffer_size"] >= max(ceil(plan.stored_numel(p) / ranks) for p in swapped)
    assert offload["buffer_count"] >= 2 * in_layers / plan.architecture.num_layers + len(swapped) - in_layers


def test_tuned_aio_uses_the_key_that_deepspeed_reads(plan_of):
    aio = build(plan_of("opt-13b", "nvme"))["aio"]

    assert aio["intra_op_parallelism"] > 1
    assert "thread_count" not in aio


@pytest.mark.parametrize("profile", PROFILES)
def test_settings_of_the_user_s_own_win(make_plan, profile):
    aio = {
        "block_size": 1 << 21,
        "queue_depth": 32,
        "intra_op_parallelism": 4,
        "single_submit": True,
        "overlap_events": False,
    }
    built = build(
        make_plan(
            "offload=nvme",
            "quant=int8",
            f"engine.profile={profile}",
            "offload.pin_memory=false",
            "offload.buffer_count=9",
            "offload.buffer_size=90000000",
            "quant.group_size=32",
            *(f"offload.aio.{key}={value}" for key, value in aio.items()),
        )
    )

    offload = built["zero_optimization"]["offload_param"]
    assert built["aio"] == aio | {"use_gds": False}
    assert (offload["pin_memory"], offload["buffer_count"], offload["buffer_size"]) == (False, 9, 90_000_000)
    assert built["weight_quantization"]["quantized_initialization"]["group_size"] == 32


@pytest.mark.parametrize(
    ("dtypes", "fp16", "bf16"), [(("float16", "bfloat16"), True, False), (("bfloat16",), False, True)]
)
def test_the_16_bit_type_is_the_plan_s(plan_of, machine, dtypes, fp16, bf16):
    built = build(plan_of("opt-125m", on=machine(dtypes=dtypes)))

    assert (built["fp16"], built["bf16"]) == ({"enabled": fp16}, {"enabled": bf16})


def test_without_offload_there_is_nothing_to_offload(plan_of):
    built = build(plan_of("opt-125m", "none"))

    assert "offload_param" not in built["zero_optimization"]
    assert "aio" not in built


def test_a_configuration_is_plain_json(plan_of):
    built = build(plan_of("opt-13b", "nvme", "int4"))

    assert json.loads(json.dumps(built)) == built


# --- DeepSpeed's own opinion ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offload", "quant", "profile"), list(product(OFFLOADS, QUANTS, PROFILES)))
def test_deepspeed_reads_every_setting(plan_of, offload, quant, profile):
    """DeepSpeed ignores keys it does not know, but for those under zero_optimization, without a word."""
    built = build(plan_of("opt-13b", offload, quant, profile))
    parsed = DeepSpeedConfig(copy.deepcopy(built))

    zero = parsed.zero_config.model_dump(mode="json", by_alias=True)
    for key, value in built["zero_optimization"].items():
        assert {**zero[key], **value} == zero[key] if isinstance(value, dict) else zero[key] == value, key
    assert parsed.train_batch_size == built["train_batch_size"]
    assert parsed.float16_config.enabled == built["fp16"]["enabled"]
    assert parsed.bfloat16_config.enabled == built["bf16"]["enabled"]
    assert parsed.steps_per_print == built["steps_per_print"]
    assert parsed.wall_clock_breakdown == built["wall_clock_breakdown"]
    if "weight_quantization" in built:
        quantization = parsed.weight_quantization_config.quantized_initialization
        assert quantization == built["weight_quantization"]["quantized_initialization"]
    if "aio" in built:
        unread = {"thread_count"} if profile == "reference" else set()  # the reference's own mistake
        assert set(built["aio"]) - set(parsed.aio_config) == unread
        assert all(parsed.aio_config[key] == built["aio"][key] for key in set(built["aio"]) - unread)
