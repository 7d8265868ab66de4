"""Tiny checkpoints of the kinds that people have trouble with, and what the engines make of them.

As a script, every checkpoint with every engine in one process, a line of JSON for each:

python checkpoints.py FOLDER [NAME…]
"""

import json
import sys
from contextlib import suppress
from itertools import product
from pathlib import Path

import torch
from families import GEN_LEN, IDS, load, outputs, plain
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

ENGINES = ("deepspeed", "stream")
CELLS = (("int4", "cpu"), ("fp16", "nvme"))
# even in INT4 the embedding is above the 1 MiB under which DeepSpeed writes nothing to disk
LLAMA = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GPT_OSS = LLAMA | {
    "intermediate_size": 256,
    "head_dim": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
}
VISION = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 4}
QWEN = {
    "vocab_size": 8192,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
FLASH = "`flash_attention_2` in `config.json`, and no such package"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


# --- how they are made -----------------------------------------------------------------------------------------------


def write(folder: Path, family: str, numbers: dict, auto=AutoModelForCausalLM) -> None:
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(family, **numbers)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # no two rows or values are alike
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)


def configure(folder: Path, **values) -> None:
    """Change `config.json`."""
    merge(folder / "config.json", **values)


def merge(file: Path, **values) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def rewrite(folder: Path, change) -> None:
    """Let `change` have its way with the tensors of the file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def llama(folder: Path, **numbers) -> None:
    write(folder, "llama", LLAMA | numbers)


def without_head(folder: Path) -> None:
    llama(folder)
    rewrite(folder, lambda tensors: tensors.pop(HEAD))


def of_another_vocabulary(folder: Path) -> None:
    llama(folder)
    configure(folder, vocab_size=LLAMA["vocab_size"] + 64)


def with_a_third_layer(folder: Path) -> None:
    llama(folder, num_hidden_layers=3)
    configure(folder, num_hidden_layers=2)


def tied(folder: Path) -> None:
    llama(folder, tie_word_embeddings=True)


def tied_with_equal_head(folder: Path) -> None:
    tied(folder)
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))


def tied_with_another_head(folder: Path) -> None:
    tied(folder)
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].flip(0)}))


def tied_with_head_alone(folder: Path) -> None:
    tied(folder)
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))


def stripped_fp8(folder: Path) -> None:
    llama(folder)

    def quantize(tensors: dict) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            blocks = (size // 128 for size in tensors[name].shape)
            tensors[f"{name}_scale_inv"] = torch.full(tuple(blocks), 0.25)
            tensors[name] = (tensors[name].float() * 4).to(torch.float8_e4m3fn)

    rewrite(folder, quantize)


def generating(**values):
    def write_both(folder: Path) -> None:
        llama(folder)
        merge(folder / "generation_config.json", **values)

    return write_both


def configured(**values):
    def write_both(folder: Path) -> None:
        llama(folder)
        configure(folder, **values)

    return write_both


def mamba(folder: Path) -> None:
    write(folder, "mamba", {"vocab_size": 8192, "hidden_size": 128, "num_hidden_layers": 2, "time_step_rank": 64})


def zamba2(folder: Path) -> None:
    numbers = {
        "num_attention_heads": 4,
        "num_mem_blocks": 1,
        "mamba_d_state": 16,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
    }
    numbers |= {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "intermediate_size": 128}
    write(folder, "zamba2", {"vocab_size": 8192, "hidden_size": 64} | numbers)


def bart(folder: Path) -> None:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 256))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    write(folder, "bart", {"vocab_size": 8192, "d_model": 128} | sizes | heads, AutoModelForSeq2SeqLM)


def gemma3_with_large_tower(folder: Path) -> None:
    text = LLAMA | {"head_dim": 64, "sliding_window": 8}
    tokens = {"image_token_index": 255, "boi_token_index": 253, "eoi_token_index": 254, "mm_tokens_per_image": 4}
    vision = VISION | {"image_size": 28, "patch_size": 14}
    write(folder, "gemma3", {"text_config": text, "vision_config": vision} | tokens, AutoModelForImageTextToText)


def qwen35_with_tower(folder: Path) -> None:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "depth": 2,
        "num_heads": 4,
        "out_hidden_size": 128,
        "patch_size": 4,
    }
    tokens = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}
    write(folder, "qwen3_5", {"text_config": QWEN, "vision_config": vision} | tokens, AutoModelForImageTextToText)


CASES = {
    "as `save_pretrained` writes it": llama,
    "one of three layers is not in `config.json`": with_a_third_layer,
    "the head is missing": without_head,
    "another vocabulary in `config.json`": of_another_vocabulary,
    "tied, with the embedding alone": tied,
    "tied, with the head alone": tied_with_head_alone,
    "tied, with an equal head": tied_with_equal_head,
    "tied, with another head": tied_with_another_head,
    "FP8, without its `quantization_config`": stripped_fp8,
    "`use_cache: false` in `config.json`": configured(use_cache=False),
    "`use_cache: false` in `generation_config.json`": generating(use_cache=False),
    "beams in `generation_config.json`": generating(num_beams=4, early_stopping=True),
    "sampling and penalties in `generation_config.json`": generating(
        do_sample=True,
        temperature=0.6,
        repetition_penalty=1.3,
        no_repeat_ngram_size=3,
        suppress_tokens=[5, 6],
        eos_token_id=[2, 3],
    ),
    FLASH: configured(_attn_implementation="flash_attention_2"),
    "Mamba": mamba,
    "Zamba2": zamba2,
    "BART": bart,
    "Gemma 3 with a vision tower larger than its text model": gemma3_with_large_tower,
    "Qwen3.5 with a vision tower": qwen35_with_tower,
}


# --- what becomes of them --------------------------------------------------------------------------------------------


def main() -> None:
    """Plain transformers first, then streaming, in a process that knows nothing of ZeRO-3 yet, as in a run."""
    folder, *names = sys.argv[1:]
    folders = {
        name: Path(folder) / f"case{index}" / "checkpoint"
        for index, name in enumerate(CASES)
        if name in (names or CASES)
    }
    expected = {}
    for name, checkpoint in folders.items():
        CASES[name](checkpoint)
        for quant in ("fp16", "int4"):
            with suppress(Exception):  # then it is for the engines to refuse it
                expected[name, quant] = outputs(plain(checkpoint, 4 if quant == "int4" else 16))
    for quant in ("fp16", "int4"):  # plain transformers wants the package: the weights are those of the first
        expected[FLASH, quant] = expected.get((next(iter(CASES)), quant))
    for engine, (name, checkpoint) in product(reversed(ENGINES), folders.items()):
        found = {outcome(checkpoint, engine, *cell, expected.get((name, cell[0]))) for cell in CELLS}
        print(json.dumps({"case": name, "engine": engine, "outcome": " / ".join(sorted(found))}), flush=True)


def outcome(checkpoint: Path, engine: str, quant: str, offload: str, expected, **settings) -> str:
    from zi_experiments.config.schema import ConfigError

    try:
        return compare(*load(checkpoint, quant, offload, engine=engine, **settings), expected)
    except ConfigError as error:
        said = f"refused: {error}"
    except Exception as error:
        said = f"**{type(error).__name__}**: {str(error).strip().splitlines()[0]}"
    return said.replace(str(checkpoint), "the checkpoint").replace("model=checkpoint:", "model=…:")


def compare(plan, session, expected) -> str:
    from zi_experiments.measurement.verification import verify
    from zi_experiments.runtime import progress

    try:
        with torch.inference_mode():
            mine = session.model(IDS.to(plan.machine.device)).logits
        tokens = session.generate(IDS, GEN_LEN, None)
        found = verify(session, plan, progress.silent())
    finally:
        session.close()
        unset_hf_deepspeed_config()  # the next model is described by itself
    if found.problem is not None:
        return f"**verification**: {found.problem}"
    if expected is None:
        return "**plain transformers cannot load it**"
    logits, same = expected[0], torch.equal(tokens, expected[1])
    if not torch.equal(mine, logits) or not same:
        error = (mine.float() - logits.float()).norm() / logits.float().norm()
        return f"**differs from plain transformers** by {error:.1e}, {'the same' if same else 'other'} tokens"
    return "runs, equal to plain transformers"


if __name__ == "__main__":
    main()
