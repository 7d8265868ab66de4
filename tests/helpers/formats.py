"""Tiny checkpoints in the formats that models are published in, as they are on disk.

Each is written by the formulas of its format's specification, or by the package that owns the format. Where plain
transformers cannot expand a format, or not as the specification says, a 16-bit twin is written beside it, from the codes.

As a script, the formats and cells that a file lists in JSON, in one process, a line of JSON for each:

python formats.py FOLDER CELLS
"""

import json
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from checkpoints import GPT_OSS, LLAMA, configure, outcome, rewrite, write
from families import group_quantized, outputs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils.quantization_config import GgufConfig

MOE = LLAMA | {
    "head_dim": 64,
    "moe_intermediate_size": 256,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
}
E4M3_LARGEST = 448.0
# values of the codes of E2M1, by the Open Compute Project's MX specification
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
TWIN = "twin"


def matrices(tensors: dict) -> list[str]:
    """The weights that publishers quantize: those of the layers' projections."""
    return [name for name in tensors if "_proj" in name and name.endswith("weight")]


def quantized(folder: Path, settings: dict, change) -> None:
    """Let `change(name, weight)` → the tensors instead of a weight, and write `quantization_config`."""

    def replace(tensors: dict) -> None:
        for name in matrices(tensors):
            tensors.update(change(name, tensors.pop(name)))

    rewrite(folder, replace)
    configure(folder, quantization_config=settings)


# --- FP8 -------------------------------------------------------------------------------------------------------------


def blocks(weight: torch.Tensor, rows: int, columns: int):
    """Yield the block at each place of the grid, and the part of the weight that it is."""
    for i, row in enumerate(range(0, weight.shape[0], rows)):
        for j, column in enumerate(range(0, weight.shape[1], columns)):
            yield (i, j), (slice(row, row + rows), slice(column, column + columns))


def fp8(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of blocks, as DeepSeek-V3 has them."""
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for place, part in blocks(weight, rows, columns):
        scales[place] = weight[part].float().abs().max() / E4M3_LARGEST
        codes[part] = (weight[part].float() / scales[place]).to(torch.float8_e4m3fn)
    return codes, scales


def block_fp8(folder: Path, family: str = "llama", **numbers) -> None:
    write(folder, family, (MOE if family == "qwen3_moe" else LLAMA) | numbers)
    in_block_fp8(folder)


def in_block_fp8(folder: Path) -> None:
    """Quantize a 16-bit checkpoint in place."""

    def change(name: str, weight: torch.Tensor) -> dict:
        codes, scales = fp8(weight, 128, 128)
        return {name: codes, f"{name}_scale_inv": scales}

    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    quantized(folder, settings, change)


def fp8_experts(folder: Path) -> None:
    block_fp8(folder, "qwen3_moe")


def ragged_fp8(folder: Path) -> None:
    """192 rows are a block and a half, of which transformers makes two of 96."""
    block_fp8(folder, intermediate_size=192, num_key_value_heads=1)

    def expand(tensors: dict) -> dict:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            scales, weight = tensors.pop(name), tensors[name.removesuffix("_scale_inv")].float()
            for place, part in blocks(weight, 128, 128):
                weight[part] *= scales[place]
            tensors[name.removesuffix("_scale_inv")] = weight.bfloat16()
        return tensors

    twin(folder, expand(load_file(folder / "model.safetensors")))


def mxfp8(folder: Path) -> None:
    write(folder, "llama", LLAMA)

    def change(name: str, weight: torch.Tensor) -> dict:
        groups = weight.float().unflatten(1, (-1, 32))
        exponents = groups.abs().amax(2).log2().floor() - 8  # of the largest value, less that of the largest code
        codes = (groups / exponents.exp2()[..., None]).clamp(-E4M3_LARGEST, E4M3_LARGEST).flatten(1)
        scales = (exponents + 127).to(torch.uint8)
        return {name: codes.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}

    settings = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
    quantized(folder, settings, change)


def twin(folder: Path, tensors: dict) -> None:
    """The 16-bit checkpoint that a quantized one stands for."""
    made = folder / TWIN
    made.mkdir()
    content = json.loads((folder / "config.json").read_text())
    content.pop("quantization_config", None)
    (made / "config.json").write_text(json.dumps(content))
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})


# --- MXFP4 -----------------------------------------------------------------------------------------------------------


def mxfp4(folder: Path) -> None:
    write(folder, "gpt_oss", GPT_OSS)

    def quantize(tensors: dict) -> None:
        for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
            weight = tensors.pop(name).float().transpose(1, 2).unflatten(2, (-1, 32))
            exponents = weight.abs().amax(3).log2().floor() - 2
            scaled = weight / exponents.exp2()[..., None]
            codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (scaled < 0)
            tensors[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
            tensors[f"{name}_scales"] = (exponents + 127).to(torch.uint8)

    rewrite(folder, quantize)
    plain_parts = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    configure(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": plain_parts})


# --- compressed-tensors ----------------------------------------------------------------------------------------------


def compressed(folder: Path, family: str, numbers: dict, form: str, weights: dict) -> None:
    """Packed by compressed-tensors itself, with the scales of the largest values."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    write(folder, family, numbers)
    group = {"targets": ["Linear"], "weights": weights}
    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }
    scheme = QuantizationConfig.model_validate(settings).config_groups["group_0"]
    size = weights.get("group_size") or numbers["hidden_size"]
    largest = E4M3_LARGEST if weights["type"] == "float" else 2 ** (weights["num_bits"] - 1) - 0.5

    def change(name: str, weight: torch.Tensor) -> dict:
        groups = weight.unflatten(1, (-1, size)) if weights.get("group_size") else weight[:, None]
        scale = (groups.float().abs().amax(2) / largest).to(weight.dtype)
        packed = BaseCompressor.get_value_from_registry(form).compress(
            {"weight": weight, "weight_scale": scale}, scheme
        )
        return {f"{name.removesuffix('.weight')}.{key}": value.contiguous() for key, value in packed.items()}

    quantized(folder, settings, change)


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}


def packed_int4(folder: Path) -> None:
    compressed(folder, "llama", LLAMA, "pack-quantized", INT4)


def packed_int4_experts(folder: Path) -> None:
    compressed(folder, "qwen3_moe", MOE, "pack-quantized", INT4)


def channel_fp8(folder: Path) -> None:
    compressed(folder, "llama", LLAMA, "float-quantized", FP8)


# --- GPTQ and AWQ ----------------------------------------------------------------------------------------------------


def asymmetric(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4-bit codes (inputs, outputs), scales and zeros (groups, outputs) of groups of inputs; zeros are 1 to 15."""
    groups = weight.float().t().unflatten(0, (-1, size))
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales).round().clamp(1, 15).int()
    codes = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15).int()
    return codes.flatten(0, 1), scales, zeros


def in_words(codes: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight 4-bit codes in each word of 32 bits, the code of column `order[i]` in its bits 4i to 4i + 3."""
    eights = codes.movedim(dim, -1).unflatten(-1, (-1, 8)).numpy().astype(np.uint32)
    words = np.zeros(eights.shape[:-1], np.uint32)
    for place, column in enumerate(order):
        words |= eights[..., column] << np.uint32(4 * place)
    return torch.from_numpy(words.view(np.int32)).movedim(-1, dim).contiguous()


def with_twin(folder: Path, settings: dict, change) -> None:
    """`change(weight)` → the tensors of a module, and the weight (outputs, inputs) that they stand for."""
    write(folder, "llama", LLAMA)
    expanded = load_file(folder / "model.safetensors")

    def both(name: str, weight: torch.Tensor) -> dict:
        tensors, expanded[name] = change(weight)
        return {f"{name.removesuffix('.weight')}.{key}": value for key, value in tensors.items()}

    quantized(folder, settings, both)
    twin(folder, expanded)


def gptq(folder: Path) -> None:
    """With inputs in the order of their importance, as with `desc_act`: those of a group are anywhere."""
    shuffle = torch.Generator().manual_seed(0)

    def change(weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
        order = torch.randperm(weight.shape[1], generator=shuffle)
        place = order.argsort()
        codes, scales, zeros = asymmetric(weight[:, order], 64)
        group = torch.arange(len(codes)) // 64
        codes, group = codes[place], group[place]
        tensors = {"qweight": in_words(codes, 0), "qzeros": in_words(zeros - 1, 1), "scales": scales}
        expanded = scales[group].float() * (codes - zeros[group])
        return tensors | {"g_idx": group.int()}, expanded.t().contiguous().bfloat16()

    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": False}
    with_twin(folder, settings | {"checkpoint_format": "gptq"}, change)


def awq(folder: Path) -> None:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def change(weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
        codes, scales, zeros = asymmetric(weight, 64)
        tensors = {"qweight": in_words(codes, 1, order), "qzeros": in_words(zeros, 1, order), "scales": scales}
        group = torch.arange(len(codes)) // 64
        expanded = scales[group].float() * (codes - zeros[group])
        return tensors, expanded.t().contiguous().bfloat16()

    settings = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    with_twin(folder, settings, change)


# --- bitsandbytes ----------------------------------------------------------------------------------------------------

# the codes of NF4, by the paper of QLoRA: quantiles of a normal distribution
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def nf4(folder: Path, is_nested: bool = False) -> None:
    """Blocks of 64 weights; with `is_nested` their largest values are codes too, in blocks of 256."""
    steps = torch.linspace(-1, 1, 256)

    def change(weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
        blocks = weight.float().view(-1, 64)
        largest = blocks.abs().amax(1)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        tensors = {"weight.absmax": largest, "weight.quant_map": NF4.clone()}
        if is_nested:
            offset = float(largest.mean())
            above = (largest - offset).view(-1, 256)
            scales = above.abs().amax(1)
            levels = (above[..., None] / scales[:, None, None] - steps).abs().argmin(-1)
            largest = (steps[levels] * scales[:, None] + offset).flatten()
            tensors |= {"weight.absmax": levels.flatten().to(torch.uint8)}
            tensors |= {"weight.nested_absmax": scales, "weight.nested_quant_map": steps.clone()}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        codes = (blocks[..., None] / largest[:, None, None] - NF4).abs().argmin(-1).flatten().to(torch.uint8)
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors |= {"weight": (codes[::2] << 4 | codes[1::2])[:, None], "weight.quant_state.bitsandbytes__nf4": text}
        return tensors, (NF4[codes.long()].view(-1, 64) * largest[:, None]).view(weight.shape).bfloat16()

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    with_twin(folder, settings | {"bnb_4bit_use_double_quant": is_nested}, change)


def nested_nf4(folder: Path) -> None:
    nf4(folder, is_nested=True)


def int8(folder: Path) -> None:
    def change(weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
        largest = weight.float().abs().amax(1)
        codes = (weight.float() * (127 / largest[:, None])).round().to(torch.int8)
        tensors = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return tensors, (codes * largest[:, None] / 127).bfloat16()

    with_twin(folder, {"load_in_8bit": True}, change)


# --- GGUF ------------------------------------------------------------------------------------------------------------


def gguf(folder: Path, **changed) -> None:
    """Q4_0 for the layers, Q8_0 for embedding and head, by the package that llama.cpp publishes."""
    import gguf as package
    from gguf.quants import quantize

    numbers = LLAMA | changed
    write(folder / "source", "llama", numbers)
    tensors = load_file(folder / "source" / "model.safetensors")
    writer = package.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_name("tiny")
    writer.add_context_length(numbers["max_position_embeddings"])
    writer.add_embedding_length(numbers["hidden_size"])
    writer.add_block_count(numbers["num_hidden_layers"])
    writer.add_feed_forward_length(numbers["intermediate_size"])
    writer.add_head_count(numbers["num_attention_heads"])
    writer.add_head_count_kv(numbers["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(numbers["vocab_size"])
    names = package.get_tensor_name_map(package.MODEL_ARCH.LLAMA, numbers["num_hidden_layers"])
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        form = package.GGMLQuantizationType.F32
        if values.ndim == 2:
            form = getattr(package.GGMLQuantizationType, "Q4_0" if "_proj" in name else "Q8_0")
        data = values if values.ndim == 1 else quantize(values, form)
        writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", data, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- what cannot be expanded here --------------------------------------------------------------------------------------


def settings_alone(**settings):
    """A checkpoint of a method whose codes are not read here: only its configuration says so."""

    def write_it(folder: Path) -> None:
        write(folder, "llama", LLAMA)
        configure(folder, quantization_config=settings)

    return write_it


FORMATS = {
    "FP8 in blocks of 128×128": block_fp8,
    "FP8 in blocks of 128×128, experts": fp8_experts,
    "FP8 whose last blocks are not whole": ragged_fp8,
    "MXFP8": mxfp8,
    "MXFP4": mxfp4,
    "compressed-tensors, INT4 in groups of 32": packed_int4,
    "compressed-tensors, INT4 in groups of 32, experts": packed_int4_experts,
    "compressed-tensors, FP8 by channel": channel_fp8,
    "GGUF, Q4_0 and Q8_0": gguf,
    "GPTQ, 4 bits, reordered": gptq,
    "AWQ, 4 bits": awq,
    "bitsandbytes, NF4": nf4,
    "bitsandbytes, NF4, nested": nested_nf4,
    "bitsandbytes, INT8": int8,
    "HQQ": settings_alone(quant_method="hqq"),
    "ModelOpt": settings_alone(quant_method="modelopt", quant_algo="NVFP4"),
}
CELLS = [  # (engine, quant, offload)
    ("stream", "native", "cpu"),
    ("stream", "int4", "cpu"),
    ("stream", "fp16", "nvme"),
    ("accelerate", "fp16", "nvme"),
    ("fsdp", "fp16", "cpu"),
    ("deepspeed", "int4", "cpu"),
    ("deepspeed", "fp16", "nvme"),
]


def path_of(folder: Path) -> Path:
    """What a user names."""
    return folder / "model.gguf" if (folder / "model.gguf").exists() else folder


def plain(folder: Path, bits: int):
    """The checkpoint in plain transformers, which expands it; its matrices quantized and expanded again below 16 bits."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (folder / TWIN).exists():
        how = {"pretrained_model_name_or_path": folder / TWIN}
    elif path_of(folder) != folder:
        how = {"gguf_file": "model.gguf", "quantization_config": GgufConfig(dequantize=True)}
    else:
        how = {"quantization_config": AutoQuantizationConfig.from_pretrained(folder, dequantize=True)}
    loaded = AutoModelForCausalLM.from_pretrained(
        **({"pretrained_model_name_or_path": folder} | how), dtype=torch.bfloat16
    )
    # compressed-tensors has put hooks into that one, which keep weights of their own
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    return group_quantized(model.eval().to(device), bits)


def stored(path: Path) -> dict | None:
    """How the plan says that the weights are stored; None: it refuses them."""
    from zi_experiments.config.composition import from_choices
    from zi_experiments.config.schema import ConfigError
    from zi_experiments.models import contents

    paths = {"model.path": str(path), "weights.path": str(path)}
    try:
        return asdict(contents.load(from_choices({"model": "local", "weights": "pretrained"}, paths)).stored)
    except ConfigError:
        return None


def main() -> None:
    folder, wanted = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    folders, expected = {}, {}
    for name in dict.fromkeys(name for name, *_ in wanted):
        folders[name] = checkpoint = folder / f"format{len(folders)}" / "checkpoint"
        checkpoint.mkdir(parents=True)
        FORMATS[name](checkpoint)
        print(json.dumps({"case": name, "stored": stored(path_of(checkpoint))}), flush=True)
        for quant in {quant for case, _, quant, _ in wanted if case == name}:
            with suppress(Exception):  # then it is for the engines to refuse it
                expected[name, quant] = outputs(plain(checkpoint, 4 if quant == "int4" else 16))
    # those of DeepSpeed last: the others run in a process that knows nothing of ZeRO-3 yet, as in a run
    for name, *cell in sorted(wanted, key=lambda each: each[1] == "deepspeed"):
        found = outcome(path_of(folders[name]), *cell, expected.get((name, cell[1])), dtype="bfloat16")
        print(json.dumps({"case": name, "cell": cell, "outcome": found}), flush=True)


if __name__ == "__main__":
    main()
