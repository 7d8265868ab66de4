"""With quant=native the stream engine computes what plain transformers does with a checkpoint of the same codes, expanded."""

import native
import pytest
import torch
from tiny import GROUPED, generate, prompts

from zi_experiments.cost_model import inventory
from zi_experiments.engines import stream
from zi_experiments.execution.preparation import prepare
from zi_experiments.measurement.verification import verify
from zi_experiments.models.weights import RandomWeights
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
    run = compose_run(
        *("quant=native", "engine=stream", "hardware=cpu", "tracking=none", "workload=smoke"),
        *("hardware.dtypes=[bfloat16]", *overrides),
    )
    run.model.architecture = {"model_type": family, **numbers, "quantization_config": stated}
    plan = prepare(run, tmp_path)
    stream.prepare(plan, silent())
    with torch.no_grad():
        return plan, stream.load(plan, stream.config(plan, str(tmp_path / "disk")), silent())


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
