import importlib
import os
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, OPTConfig, T5Config

from zi_experiments.config.schema import ConfigError, conf_dir
from zi_experiments.models import causal_lm, configuration, description

MODELS = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml") if path.stem != "local")

# Billions of parameters as published: the OPT paper and checkpoints, BigScience's, Qwen's, OpenAI's and DeepSeek's model
# cards, and the sizes of the others' checkpoints, less what they have for multi-token prediction or images. A head that is
# tied to the embedding counts once.
PUBLISHED = {
    "bloom-1b1": 1.065,
    "bloom-1b7": 1.722,
    "bloom-3b": 3.003,
    "bloom-560m": 0.5592,
    "bloom-7b1": 7.069,
    "bloom-176b": 176.2,
    "deepseek-v3": 671.0,
    "glm-4.5-air": 110.47 - 3.62,
    "glm-4.6": 356.79 - 3.99,
    "gpt-oss-20b": 20.91,
    "gpt-oss-120b": 116.83,
    "kimi-k2": 1026.4,
    "llama-2-7b": 6.738,
    "llama-2-13b": 13.02,
    "llama-2-70b": 68.98,
    "llama-3.1-8b": 8.030,
    "llama-3.1-70b": 70.55,
    "llama-4-scout": 108.64 - 0.87,
    "minimax-m2": 228.7,
    "mixtral-8x7b": 46.70,
    "mixtral-8x22b": 140.6,
    "opt-125m": 0.1252,
    "opt-350m": 0.3312,
    "opt-1.3b": 1.316,
    "opt-2.7b": 2.652,
    "opt-6.7b": 6.658,
    "opt-13b": 12.85,
    "opt-30b": 29.97,
    "opt-66b": 65.72,
    "opt-175b": 174.6,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
    "qwen3-14b": 14.77,
    "qwen3-32b": 32.76,
    "qwen3-30b-a3b": 30.53,
    "qwen3-235b-a22b": 235.1,
    "qwen3-next-80b-a3b": 81.32 - 1.65,
}

LAYER_CLASSES = {
    "bloom": "transformers.models.bloom.modeling_bloom.BloomBlock",
    "deepseek_v3": "transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3DecoderLayer",
    "glm4_moe": "transformers.models.glm4_moe.modeling_glm4_moe.Glm4MoeDecoderLayer",
    "gpt_oss": "transformers.models.gpt_oss.modeling_gpt_oss.GptOssDecoderLayer",
    "llama": "transformers.models.llama.modeling_llama.LlamaDecoderLayer",
    "llama4_text": "transformers.models.llama4.modeling_llama4.Llama4TextDecoderLayer",
    "minimax_m2": "transformers.models.minimax_m2.modeling_minimax_m2.MiniMaxM2DecoderLayer",
    "mixtral": "transformers.models.mixtral.modeling_mixtral.MixtralDecoderLayer",
    "opt": "transformers.models.opt.modeling_opt.OPTDecoderLayer",
    "qwen3": "transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer",
    "qwen3_moe": "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeDecoderLayer",
    "qwen3_next": "transformers.models.qwen3_next.modeling_qwen3_next.Qwen3NextDecoderLayer",
}


@pytest.fixture
def load(compose_run, describe):
    return lambda *overrides: describe(compose_run(*overrides))


@pytest.fixture
def llama_folder(tmp_path):
    """A model folder as transformers writes it; of its files only config.json matters here."""
    LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
        max_position_embeddings=256,
        dtype="bfloat16",
    ).save_pretrained(tmp_path / "tiny-llama")
    return tmp_path / "tiny-llama"


def test_the_table_has_every_model():
    assert sorted(PUBLISHED) == MODELS


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_as_many_as_published(load, model):
    assert load(f"model={model}").num_parameters == pytest.approx(PUBLISHED[model] * 1e9, rel=1e-3)


def test_opt_175b_has_the_published_shape(load):
    opt = load("model=opt-175b")

    assert opt.num_layers == 96
    assert opt.hidden_size == 12288
    assert opt.config.ffn_dim == 49152
    assert (49152, 12288) in {parameter.shape for parameter in opt.parameters}


@pytest.mark.parametrize("model", MODELS)
def test_the_layer_class_is_that_of_the_family(load, model):
    found = load(f"model={model}")

    (layer_class,) = found.layer_classes
    assert layer_class == LAYER_CLASSES[found.model_type]
    module, _, name = layer_class.rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), name), nn.Module)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("bloom-560m", "BloomForCausalLM"),
        ("opt-125m", "OPTForCausalLM"),
        ("llama-2-7b", "LlamaForCausalLM"),
        ("mixtral-8x7b", "MixtralForCausalLM"),
        ("qwen3-0.6b", "Qwen3ForCausalLM"),
    ],
)
def test_each_family_has_its_causal_class(compose_run, model, expected):
    config = configuration.read_config(compose_run(f"model={model}"))

    assert causal_lm.model_class(config).__name__ == expected


@pytest.mark.parametrize(
    ("model", "elements"),
    [
        ("opt-125m", 2 * 12 * 768),
        ("bloom-176b", 2 * 70 * 14336),
        ("llama-2-70b", 2 * 80 * 8 * 128),
        ("qwen3-0.6b", 2 * 28 * 8 * 128),  # its heads are wider than hidden_size / heads
        ("deepseek-v3", 61 * (512 + 64)),  # latents, and the part that is rotated
        ("qwen3-next-80b-a3b", 2 * 12 * 2 * 256),  # of every fourth layer
    ],
)
def test_keys_and_values_of_a_token(load, model, elements):
    assert load(f"model={model}").kv_elements(1) == elements


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("gen_len", [2, 2 * tiny.WINDOW])
def test_keys_and_values_are_what_the_cache_holds(family, gen_len):
    config = tiny.config(family)
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = DynamicCache(config=config)
    prompt = torch.ones(2, 3, dtype=torch.long)

    model.generate(prompt, past_key_values=cache, min_new_tokens=gen_len, max_new_tokens=gen_len, do_sample=False)

    growing = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values", "indexer_keys")]
    held = sum(tensor.numel() for tensor in growing if tensor is not None)
    # the last token is not fed to the model any more
    assert 2 * description.describe(config, family).kv_elements(3 + gen_len - 1) == held


def test_describing_a_model_does_not_choose_how_it_is_computed():
    config = tiny.config("mixtral")

    found = description.describe(config, "tiny")

    assert found.config is config
    assert config._attn_implementation != "eager"
    assert config._experts_implementation is None


def test_a_model_that_cannot_run_without_data_is_estimated_from_its_numbers():
    routed = AutoConfig.for_model("jetmoe", vocab_size=128, hidden_size=32, num_hidden_layers=3, num_local_experts=4)

    found = description.describe(routed, "tiny")

    assert found.kv_elements(10) == 10 * 3 * 2 * routed.num_key_value_heads * routed.head_dim


def test_without_attention_nothing_grows_with_a_sequence():
    """xLSTM with kernels that need data."""
    numbers = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "mode": "inference"}
    kernels = {"sequence_kernel": "native_sequence__native", "step_kernel": "native", "return_last_states": True}
    config = AutoConfig.for_model("xlstm", **numbers, **kernels, chunkwise_kernel="chunkwise--native_autograd")

    assert description.describe(config, "tiny").kv_elements(10) == 0


def test_a_tied_head_counts_once(load):
    names = [parameter.name for parameter in load("model=opt-125m").parameters]

    assert "model.decoder.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_an_untied_head_is_a_parameter(load):
    assert "lm_head.weight" in {parameter.name for parameter in load("model=llama-2-7b").parameters}


def test_layers_and_the_rest_are_told_apart(load):
    llama = load("model=llama-2-7b")
    outside = {parameter.name for parameter in llama.parameters if parameter.layer is None}

    assert outside == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_a_vision_tower_is_not_taken_for_the_decoder():
    """It has more layers here, and larger ones."""
    text = tiny.GROUPED | {"num_hidden_layers": 2, "head_dim": 8, "sliding_window": 8}
    vision = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )

    found = description.describe(config, "tiny")

    assert (found.num_layers, found.hidden_size, found.is_text_part) == (2, 32, False)
    assert found.layer_classes == ("transformers.models.gemma3.modeling_gemma3.Gemma3DecoderLayer",)
    inside = {p.name.rpartition(".layers.")[0] for p in found.parameters if p.layer is not None}
    assert inside == {"model.language_model"}
    assert any("vision_tower" in p.name for p in found.parameters)  # its bytes are counted


def test_the_text_part_is_described_where_transformers_has_a_class_for_it():
    text = tiny.GROUPED | {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    text |= {"num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    vision = {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 4, "out_hidden_size": 32}
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision, dtype="bfloat16")

    found = description.describe(config, "tiny")

    assert (found.model_type, found.config.model_type, found.dtype) == ("qwen3_5", "qwen3_5_text", "bfloat16")
    assert found.is_text_part
    assert "only the text part of qwen3_5" in found.notes[0]
    assert not any("visual" in p.name for p in found.parameters)


def test_what_several_layers_share_belongs_to_none():
    shape = {"num_hidden_layers": 4, "num_mem_blocks": 1, "mamba_d_state": 16, "n_mamba_heads": 8, "mamba_ngroups": 1}
    blocks = ["mamba", "hybrid"] * 2
    config = AutoConfig.for_model("zamba2", **tiny.SMALL | shape, intermediate_size=64, layers_block_type=blocks)

    found = description.describe(config, "tiny")

    assert [one.rpartition(".")[2] for one in found.layer_classes] == ["Zamba2MambaDecoderLayer", "Zamba2HybridLayer"]
    assert {p.layer for p in found.parameters} == {None, 0, 1, 2, 3}
    shared = [p for p in found.parameters if "shared_transformer.self_attn.q_proj.weight" in p.name]
    assert [p.layer for p in shared] == [None]


LAYERS = {
    "mamba": 32,
    "mamba2": 64,
    "falcon_mamba": 32,
    "rwkv": 32,
    "xlstm": 32,
    "jamba": 32,
    "zamba": 76,
    "olmo_hybrid": 32,
    "longcat_flash": 28,
    "modernbert-decoder": 22,
    "gpt_neox_japanese": 32,
    "git": 6,
}


@pytest.mark.parametrize("family", LAYERS)
def test_families_with_another_structure_are_described(family):
    found = description.describe(AutoConfig.for_model(family), family)

    assert found.num_layers == LAYERS[family]
    assert sum(p.numel for p in found.parameters if p.layer is not None) > 0


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("bert", "an encoder"),
        ("roberta", "an encoder"),
        ("electra", "an encoder"),
        ("xlm", "an encoder"),
        ("bart", "an encoder with a decoder"),
        ("whisper", "an encoder with a decoder"),
    ],
)
def test_an_encoder_is_refused_although_it_has_a_causal_class(family, kind):
    with pytest.raises(ConfigError, match=rf"{family} is {kind}.* and no causal language model: pass model=opt-125m"):
        description.describe(AutoConfig.for_model(family), family)


def test_bert_that_is_told_to_decode_is_none():
    assert description.describe(AutoConfig.for_model("bert", is_decoder=True), "bert").num_layers == 12


def test_a_model_of_several_widths_is_refused():
    with pytest.raises(ConfigError, match=r"blt has no single width .* pass model="):
        description.describe(AutoConfig.for_model("blt"), "blt")


def test_attention_that_is_not_installed_is_replaced_and_said():
    config = tiny.config("llama")
    config._attn_implementation = "flash_attention_3"

    found = description.describe(config, "tiny")

    assert found.notes == (
        "flash_attention_3, which the configuration asks for, is not available here: transformers' default attention is used",
    )
    assert found.config._attn_implementation is None


@pytest.mark.parametrize("available", ["sdpa", "eager"])
def test_attention_that_is_there_stays(available):
    config = tiny.config("llama")
    config._attn_implementation = available

    found = description.describe(config, "tiny")

    assert (found.notes, found.config._attn_implementation) == ((), available)


# What a layer has of more than one dimension that is not meant to be quantized; all the rest is.
LEFT_ALONE = {
    "opt": {"model.decoder.embed_positions.weight"},
    "gpt2": set(),  # its layers are Conv1D
    "falcon": set(),  # its layers are a subclass of nn.Linear
    "gemma3_text": set(),  # its embedding is scaled by a subclass of nn.Embedding
    "mixtral": {"mlp.gate.weight"},  # the router
    "gpt_oss": {"mlp.router.weight", "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"},
    "qwen3_next": {"mlp.gate.weight", "linear_attn.conv1d.weight"},
}


@pytest.mark.parametrize("family", LEFT_ALONE)
def test_matrices_and_stacked_experts_are_quantizable(family):
    parameters = description.describe(tiny.config(family), family).parameters

    left = {p.name.split(f".{p.layer}.")[-1] for p in parameters if len(p.shape) > 1 and not p.quantizable}
    assert left == LEFT_ALONE[family]
    assert not any(p.quantizable for p in parameters if len(p.shape) == 1)


def test_an_expert_is_a_matrix_of_a_3d_parameter(load):
    experts = [parameter for parameter in load("model=mixtral-8x7b").parameters if len(parameter.shape) == 3]

    assert len(experts) == 2 * 32
    assert all(parameter.quantizable for parameter in experts)


@pytest.mark.parametrize(
    ("model", "routed"), [("opt-125m", False), ("llama-2-7b", False), ("mixtral-8x7b", True), ("qwen3-30b-a3b", True)]
)
def test_a_model_with_experts_is_routed(load, model, routed):
    assert load(f"model={model}").is_routed is routed


def test_a_vector_of_three_dimensions_is_no_stack_of_experts():
    shape = {"hidden_size": 64, "attention_hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    rwkv = description.describe(AutoConfig.for_model("rwkv", vocab_size=128, **shape), "rwkv")

    mixing = [parameter for parameter in rwkv.parameters if "time_mix" in parameter.name]
    assert {len(parameter.shape) for parameter in mixing} == {3}
    assert not any(parameter.quantizable for parameter in mixing)
    assert not rwkv.is_routed


def test_positions_are_limited_where_the_model_limits_them(load):
    assert load("model=opt-125m").max_positions == 2048
    assert load("model=bloom-560m").max_positions is None  # ALiBi
    xlnet = AutoConfig.for_model("xlnet", vocab_size=128, d_model=32, n_layer=2, n_head=4, d_inner=48)
    assert xlnet.max_position_embeddings == -1
    assert description.describe(xlnet, "tiny").max_positions is None


@pytest.mark.parametrize(("model", "dtype"), [("opt-125m", "float16"), ("bloom-176b", "bfloat16")])
def test_the_dtype_is_the_one_the_configuration_names(load, model, dtype):
    assert load(f"model={model}").dtype == dtype


def test_a_folder_written_by_transformers(load, llama_folder):
    found = load("model=local", f"model.path={llama_folder}")

    assert found.model_type == "llama"
    assert found.num_layers == 3
    assert found.max_positions == 256
    assert found.dtype == "bfloat16"
    embeddings, attention, mlp, norms = 2 * 500 * 64, 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 128, 2 * 64
    assert found.num_parameters == embeddings + 3 * (attention + mlp + norms) + 64


def test_a_checkpoint_s_own_configuration_counts(compose_run, llama_folder):
    run = compose_run("model=opt-125m", "weights=pretrained", f"weights.path={llama_folder}")
    found = description.load(run)

    assert found.model_type == "llama"


def test_random_weights_take_the_model_s_numbers(load):
    assert load("model=opt-125m", "model.path=/nowhere").model_type == "opt"


def test_a_model_that_is_not_causal_is_refused_by_name(compose_run, tmp_path):
    T5Config(d_model=64, num_layers=2).save_pretrained(tmp_path)

    with pytest.raises(ConfigError, match=r"t5 is not a causal language model: pass model="):
        description.load(compose_run("model=local", f"model.path={tmp_path}"))


def test_an_unknown_model_type_is_refused_by_name(compose_run):
    with pytest.raises(ConfigError, match=r"model\.architecture\.model_type=oppt is not a model"):
        description.load(compose_run("model.architecture.model_type=oppt"))


def test_a_folder_without_a_configuration_is_refused(compose_run, tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json, .*: pass model=opt-125m"):
        description.load(compose_run("model=local", f"model.path={tmp_path}"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"model_type": "llama", "num_hidden_layers": "2"}', "'num_hidden_layers' expected int, got str"),
        ('{"model_type": "llama", "dtype": "float99"}', "has no attribute 'float99'"),
        ("[]", "Unrecognized model"),
        ("null", "NoneType"),
        ("", "not a valid JSON file"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_told_from_a_path_that_is_none(compose_run, tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(ConfigError, match=r": its config\.json cannot be read \(.*: pass model=opt-125m") as refusal:
        description.load(compose_run("model=local", f"model.path={tmp_path}"))

    assert said in str(refusal.value)


@pytest.mark.parametrize("layers", [0, -1])
def test_a_model_without_layers_is_refused(compose_run, layers):
    with pytest.raises(ConfigError, match=r"OPTForCausalLM has no decoder layers.*: pass model=opt-125m"):
        description.load(compose_run(f"model.architecture.num_hidden_layers={layers}"))


@pytest.mark.parametrize(("path", "problem"), [("/no/such/model", "does not exist"), (__file__, "is a file")])
def test_a_path_that_is_no_folder_is_refused(compose_run, path, problem):
    """The hub is not asked: no name there is a path."""
    with pytest.raises(ConfigError) as refusal:
        configuration.check_path(compose_run("model=local", f"model.path={path}"))

    assert str(refusal.value) == (
        f"{path} {problem}, and a model is a folder, a .gguf file or a hub name: "
        "pass model=opt-125m, or model=local model.path=… of another"
    )


@pytest.fixture
def kept_folder():
    """A folder that this process may not look into, for a while: root may, so it is another user meanwhile."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.rmdir()


@pytest.mark.parametrize("inside", ["", "/model", "/model.gguf"])
def test_a_path_that_is_kept_from_this_user_is_refused(compose_run, kept_folder, inside):
    with pytest.raises(
        ConfigError, match=rf"^{kept_folder}{inside} cannot be read \(Permission denied\), and a model is"
    ):
        configuration.check_path(compose_run("model=local", f"model.path={kept_folder}{inside}"))


@pytest.mark.parametrize("number", ["num_attention_heads=7", "num_hidden_layers=many"])
def test_numbers_that_make_no_model_are_refused(compose_run, number):
    with pytest.raises(ConfigError, match="opt-125m"):
        description.load(compose_run(f"model.architecture.{number}"))


def test_describing_a_model_allocates_no_weights():
    """These are 400 GB: anywhere but on the meta device this would fail."""
    wide = OPTConfig(
        hidden_size=65536, ffn_dim=262144, word_embed_proj_dim=65536, num_hidden_layers=4, num_attention_heads=64
    )

    assert description.describe(wide, "wide").num_parameters > 200e9
