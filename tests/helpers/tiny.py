"""Tiny configurations of many families, as they differ in what attention keeps: heads, widths, windows, latents."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

WINDOW = 8
SMALL = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}
SLIDING = GROUPED | {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
LATENT = GROUPED | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}

FAMILIES = {
    "opt": SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 128, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "gpt2": {"vocab_size": 128, "n_embd": 32, "n_layer": 3, "n_head": 4},
    "gptj": {"vocab_size": 128, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4},
    "gpt_neox": SMALL | {"intermediate_size": 48},
    "falcon": SMALL | {"multi_query": True},
    "falcon-grouped": SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "llama": GROUPED,
    "llama-wide": GROUPED | {"head_dim": 12},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 12},
    "phi3": GROUPED | {"pad_token_id": 0},
    "mistral": GROUPED | {"sliding_window": WINDOW},
    "mixtral": GROUPED | {"num_local_experts": 4},
    "qwen3_moe": GROUPED | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_oss": SLIDING | {"num_hidden_layers": 4, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": SLIDING | {"num_hidden_layers": 4, "head_dim": 8},
    "gemma3_text": SLIDING | {"num_hidden_layers": 4, "head_dim": 8},
    "gemma4_text": SLIDING
    | {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
    },
    "deepseek_v2": LATENT | {"topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "glm_moe_dsa": LATENT | {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 4},
    "qwen3_next": GROUPED
    | {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}

FAMILIES |= {
    "glm4_moe": LATENT | {"num_key_value_heads": 2, "head_dim": 8, "n_group": 1},
    "minimax_m2": GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": GROUPED
    | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "attention_chunk_size": WINDOW},
}

# it takes no cache but its own
MINIMAX = GROUPED | {
    "num_local_experts": 4,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}


def config(family):
    """The configuration of a tiny model, whose longest window is `WINDOW` tokens."""
    return AutoConfig.for_model(family.partition("-")[0], **FAMILIES[family])


def model(family):
    """That model with random weights, the same at each call."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(family)).eval()


def generate(model, ids, steps, cache=None):
    """Tokens and logits of greedy decoding: (batch, length + steps) and (steps, batch, vocabulary)."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        min_new_tokens=steps,
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits)


def prompts(batch, length, seed=0):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))
