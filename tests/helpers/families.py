"""Tiny models of every family, and what plain transformers computes with them.

As a script, the cells that a file lists in JSON, in one process, a line of JSON for each:

python families.py FOLDER CELLS
"""

import inspect
import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.pytorch_utils import Conv1D

# Wide enough that even in INT4 a layer has weights above the 1 MiB under which nothing goes to disk.
WIDE = {"hidden_size": 512, "intermediate_size": 3840, "num_attention_heads": 8}
GROUPED = WIDE | {"num_key_value_heads": 2, "head_dim": 64}
VOCABULARY, LARGE_VOCABULARY = 256, 4096  # in INT4 too, the table of the large one goes to disk
FAMILIES = {
    "opt": {
        "hidden_size": 512,
        "word_embed_proj_dim": 512,
        "ffn_dim": 3840,
        "num_attention_heads": 8,
        "max_position_embeddings": 64,
    },
    "bloom": {"hidden_size": 768, "n_head": 8},
    "llama": GROUPED,
    "mixtral": GROUPED | {"intermediate_size": 512, "num_local_experts": 4},
    "qwen2": {key: value for key, value in GROUPED.items() if key != "head_dim"},
    "qwen3": GROUPED,
    "qwen3_moe": GROUPED
    | {"moe_intermediate_size": 512, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
    "gpt_neox": WIDE,
    "falcon": {"hidden_size": 512, "num_attention_heads": 8, "ffn_hidden_size": 3840},
    "gemma2": GROUPED | {"sliding_window": 8},
    "gemma3_text": GROUPED | {"sliding_window": 8},
    "phi3": WIDE | {"num_key_value_heads": 2, "pad_token_id": 0},
    "gptj": {"n_embd": 512, "n_inner": 3840, "n_head": 8, "rotary_dim": 32},
    "gpt2": {"n_embd": 512, "n_inner": 3840, "n_head": 8},
    "gpt_oss": GROUPED | {"intermediate_size": 512, "num_local_experts": 4, "sliding_window": 8},
    "deepseek_v3": {
        "hidden_size": 512,
        "intermediate_size": 3840,
        "moe_intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    },
    "glm4_moe": GROUPED
    | {
        "moe_intermediate_size": 512,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "attention_bias": True,
        "use_qk_norm": True,
    },
    "minimax_m2": GROUPED | {"intermediate_size": 512, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": GROUPED
    | {
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "llama4_text": GROUPED
    | {"intermediate_size": 512, "num_local_experts": 4, "attention_chunk_size": 8, "no_rope_layers": [1, 0]},
}
FAMILIES |= {
    "opt, large tied vocabulary": FAMILIES["opt"] | {"vocab_size": LARGE_VOCABULARY},
    "llama, large untied vocabulary": FAMILIES["llama"] | {"vocab_size": LARGE_VOCABULARY},
}
LAYERS = {"bloom": "n_layer", "gptj": "n_layer", "gpt2": "n_layer"}
QUANTS = {"fp16": 16, "int4": 4, "int8": 8}
OFFLOADS = ("none", "cpu", "nvme")
# (quant, (group size, group dimension))
GROUPS = list(product(("int4", "int8"), ((32, 1), (128, 1), (32, 0), (64, 0))))
GROUPED_FAMILIES = ("llama", "mixtral", "gpt2")  # plain layers, stacked experts, Conv1D
# of engine=stream: (quant, offload, kv_cache, share that is resident, micro-batches)
STREAMED = [
    ("fp16", "cpu", "gpu", 0, 1),
    ("int8", "none", "gpu", 0, 1),
    ("int4", "cpu", "gpu", 0, 1),
    ("int4", "nvme", "gpu", 0.5, 1),
    ("int4", "cpu", "cpu", 0, 2),
]
STREAMED_GROUPS = [("int4", (32, 0)), ("int8", (128, 1))]
LAYOUTS = {  # checkpoints of other types and layouts, by (family, layout)
    ("opt", "sharded"): torch.float32,
    ("llama", "safetensors"): torch.float32,
    ("mixtral", "bin"): torch.bfloat16,
    ("gpt2", "bin"): torch.float32,
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is loaded, and how."""

    family: str
    quant: str
    offload: str
    kv_cache: str = "gpu"
    group_size: int = 64
    group_dim: int = 1
    layout: str = "safetensors"
    engine: str = "deepspeed"
    resident: float = 0
    micro_batches: int = 1

    def __str__(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


def by_deepspeed(family: str) -> list[Cell]:
    """Every quantization with every offload, and the KV cache in host memory."""
    cells = [Cell(family=family, quant=quant, offload=offload) for quant, offload in product(QUANTS, OFFLOADS)]
    return [*cells, Cell(family=family, quant="int4", offload="cpu", kv_cache="cpu")]


def by_stream(family: str) -> list[Cell]:
    names = ("quant", "offload", "kv_cache", "resident", "micro_batches")
    return [Cell(family=family, engine="stream", **dict(zip(names, each, strict=True))) for each in STREAMED]


def in_groups(family: str) -> list[Cell]:
    """Other sizes and dimensions of groups, by both engines."""
    return [
        Cell(family=family, quant=quant, offload="cpu", group_size=size, group_dim=dim, engine=engine)
        for engine, groups in (("deepspeed", GROUPS), ("stream", STREAMED_GROUPS))
        for quant, (size, dim) in groups
    ]


ALL = [cell for family in FAMILIES for cell in (*by_deepspeed(family), *by_stream(family))]
ALL += [cell for family in GROUPED_FAMILIES for cell in in_groups(family)]
ALL += [Cell(family=family, quant="int4", offload="nvme", layout=layout) for family, layout in LAYOUTS]


def chosen() -> set[Cell]:
    """One cell of each engine for every family, so that each setting meets several; and each other group once."""
    cells = set()
    for number, family in enumerate(FAMILIES):
        for of_engine in (by_deepspeed(family), by_stream(family)):
            cells.add(of_engine[number % len(of_engine)])
        if "vocabulary" in family:  # what is outside of layers goes to disk too
            cells |= {cell for cell in by_deepspeed(family) if (cell.quant, cell.offload) == ("int4", "nvme")}
    for number, cells_of_group in enumerate(zip(*map(in_groups, GROUPED_FAMILIES), strict=True)):
        cells.add(cells_of_group[number % len(GROUPED_FAMILIES)])
    return cells | {cell for cell in ALL if cell.layout in ("sharded", "bin")}


GEN_LEN = 6
IDS = torch.randint(5, 250, (2, 12), generator=torch.Generator().manual_seed(1))


def tiny_config(family: str):
    model_type = family.partition(",")[0]
    numbers = {"vocab_size": VOCABULARY, **FAMILIES[family], LAYERS.get(model_type, "num_hidden_layers"): 2}
    return AutoConfig.for_model(model_type, **numbers)


def save_checkpoint(
    folder: Path, family: str, dtype: torch.dtype = torch.float16, *, layout: str = "safetensors"
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that a misplaced one shows
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():  # DeepSeek's routers have one that decides
            if name in model.state_dict():
                buffer.add_(torch.randn_like(buffer) * 0.05)
    if layout == "bin":
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder, max_shard_size="2MB" if layout == "sharded" else "5GB")


def group_quantize(weight: torch.Tensor, bits: int, group_size: int = 64, group_dim: int = 1) -> torch.Tensor:
    """Groupwise asymmetric quantization and back, written from the format's definition and from nobody's code."""
    rows_last = weight if group_dim == 1 else weight.transpose(-1, -2)
    groups = rows_last.reshape(-1, group_size)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (2**bits - 1) / (high - low)
    codes = ((groups - low) * scale).round().clamp(0, 2**bits - 1)
    expanded = (codes / scale + low).reshape(rows_last.shape)
    # contiguous, as weights are: of others some processors compute products in another order
    return expanded if group_dim == 1 else expanded.transpose(-1, -2).contiguous()


def plain(folder: Path, bits: int, dtype: torch.dtype | None = None, **groups: int):
    """The checkpoint in plain transformers, its matrices quantized and expanded again below 16 bits."""
    device, best = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.bfloat16)
    dtype = dtype or best
    return group_quantized(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device), bits, **groups)


def group_quantized(model, bits: int, **groups: int):
    """The model with its matrices quantized and expanded again below 16 bits."""
    if bits < 16:
        done = set()
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                matrix = name == "weight" and isinstance(module, nn.Linear | nn.Embedding | Conv1D)
                matrix = matrix and "Positional" not in type(module).__name__ and not path.endswith(".dt_proj")
                stacked = parameter.dim() == 3 and not isinstance(module, nn.Conv1d)
                if (matrix or stacked) and parameter not in done:
                    done.add(parameter)
                    parameter.data = group_quantize(parameter.data, bits, **groups)
    return model


def generate(model, ids):
    """So many tokens, of which none ends a sequence, whatever the checkpoint's own configuration asks for."""
    model.generation_config = GenerationConfig(max_new_tokens=GEN_LEN, do_sample=False)
    return model.generate(ids, attention_mask=torch.ones_like(ids))


def load(folder: Path, quant: str, offload: str, kv_cache: str = "gpu", engine: str = "deepspeed", **settings):
    """A checkpoint loaded as a worker loads it: its plan and its session."""
    from zi_experiments import environment
    from zi_experiments.config.composition import from_choices
    from zi_experiments.engines import base
    from zi_experiments.execution.preparation import prepare
    from zi_experiments.runtime import progress

    choices = {"offload": offload, "quant": quant, "kv_cache": kv_cache, "engine": engine}
    choices |= {"model": "local", "weights": "pretrained", "tracking": "none"}
    # some processors compute float16 as well
    settings |= {"hardware.dtypes": None if torch.cuda.is_available() else ["bfloat16"]}
    if engine == "deepspeed" and offload == "nvme":
        settings |= {"offload.aio.queue_depth": 4}  # a process with many models never gives the kernel's requests back
    run = from_choices(choices, {"model.path": str(folder), "weights.path": str(folder), **settings})
    plan = prepare(run, [folder.parent])
    environment.set_variables(environment.worker_environment(cuda=plan.machine.device == "cuda"))
    chosen, told = base.get(engine), progress.silent()
    config = chosen.config(plan, [str(folder.parent / "disk")] if offload == "nvme" else [])
    chosen.prepare(plan, told)
    with torch.no_grad():
        return plan, chosen.load(plan, config, told)


def main() -> None:
    folder, wanted = Path(sys.argv[1]), [Cell(**cell) for cell in json.loads(Path(sys.argv[2]).read_text())]
    # all of plain transformers' before any model is under ZeRO-3: from then on transformers puts all models under it
    made = {cell: made_for(folder, cell) for cell in wanted}
    # streamed ones first, in a process that knows nothing of ZeRO-3 yet, as in a run
    for cell in sorted(wanted, key=lambda each: each.engine == "deepspeed"):
        print(json.dumps(asdict(cell) | compare(cell, *made[cell])), flush=True)


def made_for(folder: Path, cell: Cell) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A cell's checkpoint, and the logits and tokens of plain transformers."""
    return _made(folder, cell.family, cell.layout, cell.quant, cell.group_size, cell.group_dim)


@cache
def _made(folder: Path, family: str, layout: str, quant: str, group_size: int, group_dim: int):
    checkpoint = folder / family / layout / "checkpoint"
    if not checkpoint.exists():
        save_checkpoint(checkpoint, family, LAYOUTS.get((family, layout), torch.float16), layout=layout)
    return checkpoint, *outputs(plain(checkpoint, QUANTS[quant], group_size=group_size, group_dim=group_dim))


def outputs(model) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits, generate(model, IDS.to(model.device))


def compare(cell: Cell, checkpoint: Path, logits: torch.Tensor, tokens: torch.Tensor) -> dict:
    from zi_experiments.cost_model import inventory
    from zi_experiments.engines import base
    from zi_experiments.measurement.verification import verify
    from zi_experiments.runtime import progress

    engine = cell.engine
    settings = {"offload.resident": cell.resident, "workload.micro_batches": cell.micro_batches}
    if cell.quant != "fp16":
        settings |= {"quant.group_size": cell.group_size, "quant.group_dim": cell.group_dim}
    plan, session = load(checkpoint, cell.quant, cell.offload, cell.kv_cache, engine, **settings)
    ids = IDS.to(logits.device)
    with torch.inference_mode():
        mine = session.model(ids).logits
    stored, on_disk = held_by_stream(session, checkpoint) if engine == "stream" else held_by_deepspeed(session)
    planned, found = base.get(engine).stored(plan), session.inventory()
    result = {
        "difference": inventory.difference(planned, found.parameters),
        "misplaced": inventory.difference(base.get(engine).stored(in_memory(plan)), found.parameters),
        "held_bytes": found.held.gpu_bytes + found.held.cpu_bytes + found.held.nvme_bytes,
        "padding_bytes": found.held.padding_bytes,
        "parameter_bytes": 2 * sum(each.numel for each in planned.values()),
        "rel_error": float((mine.float() - logits.float()).norm() / logits.float().norm()),
        "tokens_equal": bool(torch.equal(session.generate(ids, GEN_LEN, None), tokens)),
        "problem": verify(session, plan, progress.silent()).problem,
        "quantized_fraction": plan.quantized_fraction,
        "bits_per_weight": plan.bits_per_weight,
        "planned_bytes": plan.weight_bytes,
        "stored_bytes": stored,
        "planned_disk_bytes": plan.placement.nvme_bytes,
        "disk_bytes": on_disk,
    }
    session.close()
    return result


def in_memory(plan):
    """The same plan with all weights on the device."""
    from zi_experiments.config.schema import OffloadDevice

    offload = replace(plan.run.offload, device=OffloadDevice.none)
    return replace(plan, run=replace(plan.run, offload=offload))


def held_by_deepspeed(session) -> tuple[int, int]:
    """Bytes of all weights, and of those on disk."""
    stored = [parameter.ds_tensor for parameter in session.model.parameters()]
    on_disk = [tensor for tensor in stored if tensor.final_location is not None]
    return 2 * sum(tensor.ds_numel for tensor in stored), 2 * sum(tensor.ds_numel for tensor in on_disk)


def slabs_of(session) -> list:
    """Return the slabs of streamed layers, which the session closes."""
    return inspect.getclosurevars(session._close).nonlocals["store"]._slabs


def held_by_stream(session, checkpoint: Path) -> tuple[int, int]:
    """The same: what is outside of layers, the slabs that stay with each layer, those in host memory, and the file."""
    from zi_experiments.models.structure import decoder_layers

    layers = decoder_layers(session.model)[1]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = sum(p.nbytes for p in session.model.parameters() if id(p) not in inside)
    resident = sum(layer.forward.__self__.resident.nbytes for layer in layers)
    in_memory = sum(slab.nbytes for slab in slabs_of(session) if isinstance(slab, torch.Tensor))
    on_disk = sum(file.stat().st_size for file in (checkpoint.parent / "disk").glob("rank*"))
    return outside + resident + in_memory + on_disk, on_disk


if __name__ == "__main__":
    main()
