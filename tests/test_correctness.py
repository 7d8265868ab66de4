"""What DeepSpeed computes with our configuration is what plain transformers computes with the same weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from logits import IDS
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

TINY = {
    # wide enough that, even in INT4, some weights are larger than the 1 MiB under which nothing goes to disk
    "opt": {"hidden_size": 768, "ffn_dim": 3072, "word_embed_proj_dim": 768, "num_attention_heads": 4},
    "bloom": {"hidden_size": 64, "n_head": 4},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "mixtral": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    },
}


def tiny_config(model_type: str):
    layers = {"n_layer": 2} if model_type == "bloom" else {"num_hidden_layers": 2}
    return AutoConfig.for_model(model_type, vocab_size=256, **TINY[model_type], **layers)


def save_checkpoint(folder: Path, model_type: str, dtype: torch.dtype, *, layout: str = "safetensors") -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that a misplaced one shows
            parameter.add_(torch.randn_like(parameter) * 0.05)
    if layout == "bin":
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder, max_shard_size="2MB" if layout == "sharded" else "5GB")


def group_quantize(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Groupwise asymmetric quantization and back, written from the format's definition and not from DeepSpeed's code."""
    groups = weight.reshape(-1, group_size)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (2**bits - 1) / (high - low)
    codes = ((groups - low) * scale).round().clamp(0, 2**bits - 1)
    return (codes / scale + low).reshape(weight.shape)


def reference(folder: Path, bits: int) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    if bits < 16:
        done = set()
        for module in model.modules():
            if type(module) in (nn.Linear, nn.Embedding) and id(module.weight) not in done:
                done.add(id(module.weight))
                module.weight.data = group_quantize(module.weight.data, bits, 64)
    with torch.no_grad():
        return model(IDS).logits


def deepspeed_result(tmp_path: Path, *, offload: str = "cpu", ranks: int = 1, **arguments) -> dict:
    arguments = {
        "cpu_offload": offload == "cpu",
        "disk_offload": offload == "nvme",
        "offload_dir": str(tmp_path / "disk"),
        "dummy_weights": None,
        "group_size": 64,
        **arguments,
    }
    out = tmp_path / "out.pt"
    script = Path(__file__).parent / "logits.py"
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(script), str(out), json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    assert not list((tmp_path / "disk").glob("*")), "the offload folder outlives the process"
    return torch.load(out)


@pytest.mark.parametrize(
    ("model_type", "bits", "offload", "dtype", "layout"),
    [
        ("opt", 16, "none", torch.bfloat16, "safetensors"),
        ("opt", 16, "nvme", torch.float32, "sharded"),
        ("opt", 4, "nvme", torch.float16, "sharded"),
        ("opt", 8, "cpu", torch.float32, "bin"),
        ("bloom", 4, "cpu", torch.float16, "bin"),
        ("llama", 4, "cpu", torch.float32, "safetensors"),
        ("llama", 16, "cpu", torch.float16, "safetensors"),
        ("mixtral", 4, "cpu", torch.bfloat16, "safetensors"),
    ],
)
def test_logits_equal_plain_transformers(tmp_path, model_type, bits, offload, dtype, layout):
    """Each row with a 16-bit checkpoint of another dtype, or fp32, gives noise or an error in DeepSpeed alone."""
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(checkpoint, model_type, dtype, layout=layout)

    result = deepspeed_result(tmp_path, model_name=str(checkpoint), bits=bits, offload=offload)

    logits = reference(checkpoint, bits)
    error = (result["logits"].float() - logits.float()).norm() / logits.float().norm()
    print(f"relative error {error:.5f}")
    # DeepSpeed adds a bias after the product, not with it: one more rounding to bfloat16
    assert error < (0.02 if model_type in ("opt", "bloom") else 1e-6)
    assert torch.equal(result["again"], result["logits"])
    first, second = logits.float().topk(2).values.unbind(-1)
    clear = first - second > 0.2 * logits.float().std()  # a near tie may fall either way in bfloat16
    assert clear.sum() > 4
    assert torch.equal(result["logits"].argmax(-1)[clear], logits.argmax(-1)[clear])
    assert (result["on_disk"] > 0) == (offload == "nvme")


@pytest.mark.parametrize(("bits", "offload"), [(4, "cpu"), (16, "nvme")])
def test_two_ranks_compute_what_one_does(tmp_path, bits, offload):
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(checkpoint, "opt", torch.float32)
    arguments = {"model_name": str(checkpoint), "bits": bits, "offload": offload}

    one = deepspeed_result(tmp_path, **arguments)
    two = deepspeed_result(tmp_path, **arguments, ranks=2, batch_size=2)

    assert torch.equal(one["logits"], two["logits"])
    assert torch.equal(one["tokens"], two["tokens"])


def test_a_checkpoint_without_a_weight_is_refused_by_its_name(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(checkpoint, "llama", torch.float32, layout="bin")
    state = torch.load(checkpoint / "pytorch_model.bin")
    del state["model.layers.1.mlp.up_proj.weight"]
    torch.save(state, checkpoint / "pytorch_model.bin")

    with pytest.raises(RuntimeError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        deepspeed_result(tmp_path, model_name=str(checkpoint), bits=4)


def test_random_weights_depend_on_nothing_but_the_seed(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path / "shape")
    arguments = {"model_name": str(tmp_path / "shape"), "dummy_weights": "random"}

    on_cpu = deepspeed_result(tmp_path, bits=16, **arguments)
    resident = deepspeed_result(tmp_path, bits=16, offload="none", **arguments)
    quantized = deepspeed_result(tmp_path, bits=8, **arguments)

    assert torch.isfinite(on_cpu["logits"]).all()
    assert on_cpu["logits"].float().std() > 0.1
    assert torch.equal(on_cpu["logits"], resident["logits"])
    error = (quantized["logits"].float() - on_cpu["logits"].float()).norm() / on_cpu["logits"].float().norm()
    assert 0 < error < 0.05
