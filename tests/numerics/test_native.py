"""With quant=native the stream engine computes what plain transformers does with a checkpoint of the same codes, expanded."""

from dataclasses import replace

import families
import native
import pytest
import torch
from checkpoints import configure, rewrite
from tiny import GROUPED, generate, prompts
from transformers import AutoConfig

from zi_experiments.config.schema import ConfigError
from zi_experiments.cost_model import inventory
from zi_experiments.engines import stream
from zi_experiments.execution.preparation import prepare
from zi_experiments.measurement.verification import verify
from zi_experiments.models import contents
from zi_experiments.models.packing import Code, Format, Packing
from zi_experiments.models.weights import PretrainedWeights, RandomWeights
from zi_experiments.runtime.progress import silent

STEPS = 5
EXPERTS = {"head_dim": 16, "num_experts_per_tok": 2, "num_hidden_layers": 3}
MODELS = {
    # matrices of several whole blocks, and of one that is not whole
    "llama": ("llama", native.FP8, GROUPED | {"hidden_size": 256, "intermediate_size": 384, "num_key_value_heads": 1}),
    "llama-small": ("llama", native.FP8, GROUPED | {"hidden_size": 64, "intermediate_size": 96}),
    "qwen3_moe": (
        "qwen3_moe",
        native.FP8 | {"modules_to_not_convert": ["lm_head", "model.layers.1.self_attn"]},
        GROUPED | EXPERTS | {"hidden_size": 128, "num_experts": 8, "moe_intermediate_size": 48},
    ),
    "llama-int4": (
        "llama",
        native.INT4 | {"ignore": ["lm_head", "model.layers.0.mlp.up_proj"]},
        GROUPED | {"hidden_size": 64, "intermediate_size": 96},
    ),
    "qwen3_moe-int4": (
        "qwen3_moe",
        native.INT4,
        GROUPED | EXPERTS | {"hidden_size": 64, "num_experts": 8, "moe_intermediate_size": 32},
    ),
    "gpt_oss": (
        "gpt_oss",
        native.MXFP4,
        GROUPED | EXPERTS | {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 8},
    ),
}


def loaded(compose_run, tmp_path, model, *overrides):
    """The plan and the session of a model with random codes."""
    family, stated, numbers = MODELS[model]
    architecture = {"model_type": family, **numbers, "quantization_config": stated}
    return load(compose_run, tmp_path, {"architecture": architecture}, *overrides)


def load(compose_run, tmp_path, values, *overrides):
    run = compose_run(
        *("quant=native", "engine=stream", "hardware=cpu", "tracking=none", "workload=smoke"),
        *("hardware.dtypes=[bfloat16]", *overrides),
    )
    vars(run.model).update(values)
    plan = prepare(run, [tmp_path])
    stream.prepare(plan, silent())
    with torch.no_grad():
        return plan, stream.load(plan, stream.config(plan, [str(tmp_path / "disk")]), silent())


@pytest.mark.parametrize(
    ("model", "offload", "resident"),
    [
        ("llama", "cpu", 0),
        ("llama", "nvme", 0.5),
        ("llama-small", "cpu", 0.5),
        ("llama-small", "nvme", "auto"),
        ("qwen3_moe", "cpu", 0),
        ("qwen3_moe", "cpu", "auto"),
        ("qwen3_moe", "nvme", 0.5),
        ("llama-int4", "cpu", 0.5),
        ("qwen3_moe-int4", "cpu", 0),
        ("qwen3_moe-int4", "nvme", "auto"),
        ("gpt_oss", "cpu", 0),
        ("gpt_oss", "cpu", 0.5),
        ("gpt_oss", "nvme", "auto"),
    ],
)
def test_logits_and_tokens_are_those_of_the_dequantized_checkpoint(compose_run, tmp_path, model, offload, resident):
    plan, session = loaded(compose_run, tmp_path, model, f"offload={offload}", f"offload.resident={resident}")
    native.save(
        tmp_path / "checkpoint",
        plan.architecture,
        RandomWeights(plan.run.weights.seed),
        MODELS[model][1],
        torch.bfloat16,
    )
    reference, ids = native.plain(tmp_path / "checkpoint", torch.bfloat16), prompts(2, 9)
    tokens, _ = generate(reference, ids, STEPS)
    with torch.inference_mode():
        expected, found = reference(ids).logits, session.model(ids).logits

    assert expected.isfinite().all()
    assert torch.equal(found, expected)
    assert torch.equal(session.generate(ids, STEPS, None), tokens)
    assert inventory.difference(stream.stored(plan), session.inventory().parameters) is None
    assert verify(session, plan, silent()).problem is None
    session.close()


def pretrained(compose_run, tmp_path, folder, *overrides):
    overrides = ("weights=pretrained", f"weights.path={folder}", *overrides)
    return load(compose_run, tmp_path, {"architecture": None, "path": str(folder)}, *overrides)


def written(compose_run, folder, model, change=lambda tensors: None):
    """A checkpoint with random codes in a true format."""
    family, stated, numbers = MODELS[model]
    run = compose_run("quant=native", "engine=stream", "hardware=cpu")
    run.model.architecture = {"model_type": family, **numbers, "quantization_config": stated}
    native.save(folder, contents.load(run), RandomWeights(3), stated, torch.bfloat16)
    rewrite(folder, change)


@pytest.mark.parametrize(
    ("model", "offload"),
    [("llama", "nvme"), ("qwen3_moe", "cpu"), ("llama-int4", "cpu"), ("qwen3_moe-int4", "nvme"), ("gpt_oss", "cpu")],
)
def test_a_checkpoint_keeps_its_codes(compose_run, tmp_path, model, offload):
    folder = tmp_path / "checkpoint"
    written(compose_run, folder, model)
    plan, session = pretrained(compose_run, tmp_path, folder, f"offload={offload}", "offload.resident=0.5")
    reference, ids = native.plain(folder, torch.bfloat16), prompts(2, 9)
    tokens, _ = generate(reference, ids, STEPS)
    with torch.inference_mode():
        expected, found = reference(ids).logits, session.model(ids).logits
    made = contents.load(replace(plan.run, weights=replace(plan.run.weights, path=None)))

    assert {p.name: p.native for p in plan.architecture.parameters} == {p.name: p.native for p in made.parameters}
    assert torch.equal(found, expected)
    assert torch.equal(session.generate(ids, STEPS, None), tokens)
    assert inventory.difference(stream.stored(plan), session.inventory().parameters) is None
    checked = verify(session, plan, silent())
    # transformers loads no FP8 with blocks that are not whole
    kind = "AutoModelForCausalLM" if plan.architecture.stored.is_expanded_by_transformers else "layer by layer"
    assert (checked.problem, checked.reference) == (None, kind)
    session.close()


def test_what_the_files_have_decides(compose_run, tmp_path):
    """A layer in 16 bits, whatever the configuration says; scales of another type than it says, in another order."""
    folder = tmp_path / "checkpoint"

    def change(tensors):
        for scales in [name for name in tensors if "layers.0.self_attn" in name and name.endswith("_scale_inv")]:
            name = scales.removesuffix("_scale_inv")
            tensors[name] = torch.randn(tensors[name].shape).bfloat16() / 16
            del tensors[scales]
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = tensors[name].bfloat16()
        for name in sorted(tensors, reverse=True):
            tensors[name] = tensors.pop(name)

    written(compose_run, folder, "qwen3_moe", change)
    configure(folder, quantization_config=native.FP8 | {"scale_fmt": "ue8m0"})
    plan, session = pretrained(compose_run, tmp_path, folder)
    reference, ids = native.plain(folder, torch.bfloat16), prompts(2, 9)
    with torch.inference_mode():
        expected, found = reference(ids).logits, session.model(ids).logits
    packings = {p.name: p.native for p in plan.architecture.parameters}

    assert packings["model.layers.0.self_attn.q_proj.weight"] is None
    assert packings["model.layers.1.self_attn.q_proj.weight"] is None
    assert packings["model.layers.2.self_attn.q_proj.weight"].format.numbers == (4,)
    assert torch.equal(found, expected)
    session.close()


def test_a_checkpoint_in_16_bits_has_no_native_format(compose_run, tmp_path):
    families.save_checkpoint(tmp_path / "checkpoint", "llama")
    with pytest.raises(ConfigError, match=r"quant=native keeps weights as .* is stored as float16"):
        pretrained(compose_run, tmp_path, tmp_path / "checkpoint")


def test_integers_are_multiplied_in_the_type_of_their_scales(compose_run, tmp_path):
    written(compose_run, tmp_path / "checkpoint", "llama-int4")
    with pytest.raises(
        ConfigError, match="has scales in bfloat16, which quant=native multiplies with: pass dtype=bfloat16"
    ):
        pretrained(
            compose_run, tmp_path, tmp_path / "checkpoint", "dtype=float16", "hardware.dtypes=[float16,bfloat16]"
        )


def test_files_that_came_after_the_plan_are_compared_with_it(compose_run, tmp_path):
    folder = tmp_path / "checkpoint"
    written(compose_run, folder, "llama-small")
    source = PretrainedWeights(str(folder), AutoConfig.from_pretrained(folder), torch.bfloat16)
    other = Packing(format=Format(name="FP8", code=Code.e4m3, bits=8, group=(128, 128), numbers=(1,)))
    with pytest.raises(
        ConfigError, match=r"which are here only now, have model\.layers\.0\.mlp\.up_proj\.weight in another"
    ):
        source.packed("model.layers.0.mlp.up_proj.weight", (96, 64), other, torch.bfloat16, "cpu")
