"""Checkpoints in the formats in which large models are published, written from codes, and loaded by plain transformers."""

import json

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers import AutoQuantizationConfig

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*self_attn.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def save(folder, architecture, source, stated, dtype) -> None:
    """The weights that `source` has of an architecture, under the names that such checkpoints have."""
    tensors = {}
    for p in architecture.parameters:
        if p.native is None:
            value = torch.empty(p.shape, dtype=dtype)
            source.fill(p.name, value)
            tensors |= unstacked(p, value)
        else:
            tensors |= stored(p, source.packed(p.name, p.shape, p.native, dtype, torch.device("cpu")))
    folder.mkdir()
    architecture.config.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": stated}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def stored(p, packed) -> dict[str, torch.Tensor]:
    if p.native.transposed:
        blocks = packed.codes.unflatten(-1, (-1, 16))
        return {f"{p.name}_blocks": blocks, f"{p.name}_scales": packed.scales}
    pairs = list(zip(packed.codes, packed.scales, strict=True))
    owner, _, key = p.name.rpartition(".")
    keys = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(key)
    names = [p.name] if keys is None else [f"{owner}.{e}.{one}.weight" for e in range(p.shape[0]) for one in keys]
    tensors = {}
    for name, (codes, scales) in zip(names, pairs, strict=True):
        if p.native.format.bits == 8:
            tensors |= {name: codes.clone().view(torch.float8_e4m3fn), f"{name}_scale_inv": scales.clone()}
        else:
            shape = torch.tensor([len(codes), 2 * codes.shape[1]])
            tensors |= {f"{name}_packed": codes.clone().view(torch.int32), f"{name}_scale": scales.clone()}
            tensors |= {f"{name}_shape": shape}
    return tensors


def unstacked(p, value) -> dict[str, torch.Tensor]:
    """A 16-bit parameter; only biases are kept stacked by all families here."""
    assert p.experts is None or p.name.endswith("_bias")
    return {p.name: value}


def plain(folder, dtype):
    how = {"quantization_config": AutoQuantizationConfig.from_pretrained(folder, dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how).eval()
