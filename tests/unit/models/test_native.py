"""Which parameters of a model are published quantized, in which format, and what that takes."""

import pytest
import torch

from zi_experiments.engines import stream
from zi_experiments.models.native import Packed, random
from zi_experiments.models.packing import Code
from zi_experiments.models.weights import RandomWeights

BLOCKS = "+model.architecture.quantization_config={quant_method:fp8,weight_block_size:[128,128]}"
NATIVE = ("quant=native", "engine=stream")


def in_16_bits(plan):
    """Names of the matrices in decoder layers that are not quantized, without the numbers of layers."""
    names = (p.name for p in plan.architecture.parameters if p.native is None and len(p.shape) > 1)
    return {".".join(part for part in name.split(".") if not part.isdigit()) for name in names}


@pytest.mark.parametrize(
    ("model", "format", "bits", "left"),
    [
        (
            "gpt-oss-20b",
            "MXFP4",
            4,
            {"q_proj", "k_proj", "v_proj", "o_proj", "router", "gate_up_proj_bias", "down_proj_bias"},
        ),
        ("deepseek-v3", "FP8", 8, {"gate"}),
        ("kimi-k2", "FP8", 8, {"gate"}),
        ("minimax-m2", "FP8", 8, {"gate"}),
    ],
)
def test_shipped_models_are_quantized_where_their_publisher_does_it(make_plan, machine, model, format, bits, left):
    plan = make_plan(
        f"model={model}", *NATIVE, "verify=off", on=machine(host_memory_bytes=2 * 10**12, gpu_memory_bytes=10**12)
    )

    assert [each.name for each in plan.formats] == [format]
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in in_16_bits(plan)} == {
        *left,
        "embed_tokens",
        "lm_head",
    }
    assert bits < plan.bits_per_weight < 1.4 * bits, "embeddings and head have 16"
    assert not hasattr(plan.architecture.config, "quantization_config"), "transformers would load another model"


def test_sizes_by_hand(make_plan, machine):
    """Blocks at the edge of a matrix have a scale each; each expert has a matrix for its gate and one beside it."""
    overrides = (
        "model=qwen3-30b-a3b",
        "model.architecture.hidden_size=200",
        "model.architecture.moe_intermediate_size=300",
    )
    plan = make_plan(*overrides, BLOCKS, *NATIVE, on=machine("cpu"))
    stored = {p.name.partition(".0.")[2]: plan.stored_numel(p) for p in plan.architecture.parameters if p.layer == 0}

    assert stored["mlp.experts.gate_up_proj"] == 128 * 2 * (300 * 200 + 3 * 2 * 4) // 2
    assert stored["mlp.experts.down_proj"] == 128 * (200 * 300 + 2 * 3 * 4) // 2
    assert stored["self_attn.o_proj.weight"] == (200 * 4096 + 2 * 32 * 4) // 2
    assert stored["mlp.gate.weight"] == 128 * 200


@pytest.mark.parametrize("quant", ["fp16", "int4"])
def test_nothing_changes_for_other_quantizations(make_plan, machine, quant):
    cells = [make_plan("model=llama-2-7b", f"quant={quant}", *more, on=machine()) for more in ((), (BLOCKS,))]

    assert len({(plan.weight_bytes, plan.placement, plan.storage.notes) for plan in cells}) == 1
    assert "quantization_config" not in cells[1].architecture.config.to_dict()


@pytest.mark.parametrize(
    "stated",
    [
        "{quant_method:gptq,bits:4}",
        "{quant_method:compressed-tensors,format:pack-quantized,config_groups:{a:{targets:[Linear],weights:{num_bits:3}}}}",
        "{quant_method:compressed-tensors,config_groups:null}",
        "{quant_method:fp8}",
        "{quant_method:fp8,weight_block_size:null}",
        "{quant_method:fp8,weight_block_size:[128]}",
        "{quant_method:fp8,weight_block_size:[0,128]}",
        "{quant_method:fp8,weight_block_size:[128,128],scale_fmt:other}",
        "{quant_method:fp8,weight_block_size:[128,128],expert_dtype:fp4}",
        "{quant_method:mxfp4}",  # no family but gpt-oss is published in it
        "{}",
    ],
)
def test_a_format_that_is_not_known_is_refused(refusal, machine, stated):
    said = refusal("model=llama-2-7b", f"+model.architecture.quantization_config={stated}", *NATIVE, on=machine())

    assert "quant=native keeps weights as block FP8" in said


def test_a_model_that_is_published_in_16_bits_is_refused_and_so_are_other_engines(refusal, machine):
    assert "opt-125m is published in none of them" in refusal("model=opt-125m", *NATIVE, on=machine())
    for engine in ("deepspeed", "accelerate", "fsdp"):
        assert f"engine={engine}" in refusal("model=gpt-oss-20b", "quant=native", f"engine={engine}", on=machine())


def test_groups_have_to_divide_the_inputs(refusal, machine):
    numbers = ("model.architecture.intermediate_size=2832",)
    said = refusal("model=gpt-oss-20b", *numbers, *NATIVE, on=machine())

    assert "MXFP4 has groups of 32, which do not divide the 2832 inputs of model.layers.0.mlp.experts.down_proj" in said


def test_patterns_of_compressed_tensors(make_plan, machine):
    """Kimi-K2-Thinking's: only its experts are quantized, which are linear layers of their own in checkpoints."""
    weights = "{num_bits:4,type:int,symmetric:true,strategy:group,group_size:32,actorder:null}"
    ignore = r"[lm_head,'re:.*self_attn.*','re:.*shared_experts.*','re:.*mlp\.(gate|up|gate_up|down)_proj.*']"
    groups = f"{{a:{{targets:[Linear],weights:{weights}}}}}"
    stated = f"{{quant_method:compressed-tensors,format:pack-quantized,ignore:{ignore},config_groups:{groups}}}"
    plan = make_plan(
        *(
            "model=kimi-k2",
            "~model.architecture.quantization_config",
            f"+model.architecture.quantization_config={stated}",
        ),
        *(*NATIVE, "verify=off"),
        on=machine(host_memory_bytes=2 * 10**12, gpu_memory_bytes=10**12),
    )
    packed = {p.name.rpartition(".mlp.")[2] for p in plan.architecture.parameters if p.native}

    assert packed == {"experts.gate_up_proj", "experts.down_proj"}
    assert [each.name for each in plan.formats] == ["INT4"]
    assert 4.5 < plan.bits_per_weight < 4.8


def test_what_transformers_needs_to_verify_is_asked_for(make_plan, machine, monkeypatch):
    weights = "{num_bits:4,type:int,symmetric:true,strategy:group,group_size:32}"
    groups = f"{{a:{{targets:[Linear],weights:{weights}}}}}"
    stated = f"{{quant_method:compressed-tensors,format:pack-quantized,config_groups:{groups}}}"
    plans = [
        make_plan(
            "model=llama-2-7b",
            f"+model.architecture.quantization_config={stated}",
            *NATIVE,
            f"verify={verify}",
            on=machine("cpu"),
        )
        for verify in ("on", "off")
    ]

    assert [list(stream.requirements(plan)) for plan in plans] == [[], []]
    monkeypatch.setattr(stream, "find_spec", lambda name: None)
    (lacking,) = stream.requirements(plans[0])
    assert lacking.endswith("pip install compressed-tensors")
    assert not list(stream.requirements(plans[1]))


def test_exponents_as_scales(make_plan, machine):
    stated = BLOCKS.replace("}", ",scale_fmt:ue8m0}").replace("128,128", "1,32")
    plan = make_plan("model=llama-2-7b", stated, *NATIVE, on=machine())

    assert 8.25 < plan.bits_per_weight < 8.6


@pytest.mark.parametrize("model", ["gpt-oss-20b", "deepseek-v3"])
def test_random_codes_give_weights_of_an_ordinary_size(compose_run, describe, model):
    parameters = [p for p in describe(compose_run(f"model={model}", "engine=stream")).parameters if p.native]
    for p in (parameters[0], parameters[-1]):
        shape = (2, *p.shape[1:]) if len(p.shape) == 3 else p.shape
        one = RandomWeights(1).packed(p.name, shape, p.native, torch.bfloat16, "cpu")
        again, other = (RandomWeights(seed).packed(p.name, shape, p.native, torch.bfloat16, "cpu") for seed in (1, 2))
        columns = p.native.codes(shape)[2]
        numbers = one.codes.view(torch.float8_e4m3fn).float() if p.native.format.code is Code.e4m3 else None
        if numbers is not None:
            assert numbers.isfinite().all()
            spread = float(numbers.std() * one.scales.square().mean().sqrt())
        else:
            spread = float(one.scales.double().sub(127).exp2().square().mean().sqrt()) * 2.93

        assert torch.equal(one.codes, again.codes)
        assert torch.equal(one.scales, again.scales)
        assert not torch.equal(one.codes, other.codes)
        assert 0.5 < spread * columns**0.5 < 2


def test_all_codes_are_drawn(compose_run, describe):
    (p, *_) = [p for p in describe(compose_run("model=deepseek-v3", "engine=stream")).parameters if p.native]
    found: Packed = random(p.native, (512, 512), torch.bfloat16, torch.Generator().manual_seed(0))

    assert found.codes.unique().numel() == 254
    assert found.scales.unique().numel() == 16
