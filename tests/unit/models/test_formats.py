"""Checkpoints whose weights are quantized already: what is refused, what is told, and how much is in memory."""

import json
import shutil

import formats as made
import pytest
import torch
from checkpoints import LLAMA, configure, rewrite, write
from torch.utils._python_dispatch import TorchDispatchMode

from zi_experiments.config.schema import ConfigError
from zi_experiments.models import contents, expansion, formats, gguf_file, opening
from zi_experiments.models.weights import PretrainedWeights

GPTQ = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"}


@pytest.fixture
def held(compose_run):
    """`held(path)` → the architecture of a checkpoint."""
    return lambda path: contents.load(compose_run("model=local", f"model.path={path}", "weights=pretrained"))


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "hqq"}, "by hqq, which cannot be expanded to 16 bits here"),
        ({"quant_method": "bitsandbytes"}, "has no weights in the format that its config.json names, bitsandbytes"),
        ({"load_in_8bit": True}, "has no weights in the format that its config.json names, bitsandbytes"),
        ({"bits": 8}, "by an unnamed method, which"),
        (GPTQ | {"bits": 3}, "by gptq with bits=3, of which"),
        (GPTQ | {"checkpoint_format": "marlin"}, "by gptq in the format marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "by awq with bits=4 and version=gemv"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "in the format marlin-24, which this version"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"targets": ["Linear"], "weights": {"actorder": "group"}}},
            },
            "with reordered columns",
        ),
        (GPTQ, "has no weights in the format that its config.json names, gptq"),
        ({"quant_method": "a\nb\x1b[2J"}, r"by a\nb\x1b[2J, which"),
    ],
)
def test_what_cannot_be_expanded_is_refused_in_one_line(held, tmp_path, settings, said):
    write(tmp_path, "llama", LLAMA | {"num_hidden_layers": 1})
    configure(tmp_path, quantization_config=settings)

    with pytest.raises(ConfigError) as refused:
        held(tmp_path)

    assert said in str(refused.value)
    assert ": pass weights.path=… of a" in str(refused.value)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(("write_it", "is_noted"), [(made.awq, True), (made.ragged_fp8, True), (made.block_fp8, False)])
def test_a_note_says_where_verification_expands_weights_as_the_engine_does(held, tmp_path, write_it, is_noted):
    write_it(tmp_path)
    found = held(tmp_path)

    assert found.stored.is_expanded_by_transformers is not is_noted
    assert any("verification expands them by the code that the engine has" in note for note in found.notes) is is_noted


def test_a_missing_package_is_named_with_its_command(held, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    made.packed_int4(tmp_path / "packed")
    made.gguf(tmp_path)

    for path, package in ((tmp_path / "packed", "compressed-tensors"), (tmp_path / "model.gguf", "gguf")):
        with pytest.raises(ConfigError, match=f": pip install {package} .*or pass "):
            held(path)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    made.gguf(folder := tmp_path_factory.mktemp("gguf"))
    return folder / "model.gguf"


def rename_architecture(file, name):
    """Another name of as many letters."""
    length = len(name).to_bytes(8, "little")
    file.write_bytes(file.read_bytes().replace(length + b"llama", length + name, 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.unlink(), "is not a file: pass model.path="),
        (lambda file: file.write_bytes(b"<html>"), "does not begin as a GGUF file: copy or download it again"),
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "is a damaged GGUF file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-5000]), ": copy or download it again"),
        (
            lambda file: rename_architecture(file, b"rwkv9"),
            "of rwkv9, which is not read here: pass model.path=…",
        ),
    ],
)
def test_a_gguf_file_that_cannot_be_read(held, tmp_path, gguf, change, said):
    shutil.copy(gguf, file := tmp_path / "model.gguf")
    change(file)

    with pytest.raises(ConfigError) as refused:
        held(file)

    assert said in str(refused.value)


def test_a_gguf_file_has_no_revision(compose_run, gguf):
    run = compose_run("model=local", f"model.path={gguf}", "model.revision=v2")

    with pytest.raises(ConfigError, match=r"model\.revision=v2 is of the hub, and .*model\.gguf is on this machine"):
        contents.load(run)


# --- told ------------------------------------------------------------------------------------------------------------


def test_of_random_weights_the_format_is_dropped_and_a_note_says_so(compose_run, tmp_path):
    made.mxfp4(tmp_path)

    found = contents.load(compose_run("model=local", f"model.path={tmp_path}"))

    assert getattr(found.config, "quantization_config", None) is None
    assert found.stored is None
    assert found.notes[-1].startswith(
        "the model is published with weights quantized by mxfp4: random weights are made in"
    )


@pytest.mark.parametrize(
    ("make", "form", "bits"),
    [
        (made.block_fp8, "fp8 (e4m3)", 8 + 32 / 128**2),
        (made.mxfp8, "mxfp8", 8 + 8 / 32),
        (made.mxfp4, "mxfp4", 4 + 8 / 32),
        (made.packed_int4, "compressed-tensors (pack-quantized)", 4 + 16 / 32),
        (made.awq, "awq", 4 + (16 + 4) / 64),
    ],
)
def test_the_bits_of_a_parameter_are_those_of_its_format(held, tmp_path, make, form, bits):
    """Embedding, head and norms have 16, and in gpt-oss attention too."""

    def is_coded(name, parameter):
        return "_proj" in name and len(parameter.shape) == (3 if make is made.mxfp4 else 2)

    make(tmp_path)
    found = held(tmp_path).stored
    parameters = {p.name: p for p in held(tmp_path).parameters}
    quantized = sum(p.numel for name, p in parameters.items() if is_coded(name, p))
    everything = sum(p.numel for p in parameters.values())
    expected = (quantized * bits + (everything - quantized) * 16) / everything

    assert found.format == form
    assert found.bits_per_parameter == pytest.approx(expected, rel=1e-3)
    assert found.is_quantized


def test_a_plain_checkpoint_has_the_type_of_its_weights(held, tmp_path):
    write(tmp_path, "llama", LLAMA)

    found = held(tmp_path).stored

    assert (found.format, found.bits_per_parameter, found.is_quantized) == ("bfloat16", 16, False)


def test_the_part_for_text_may_have_the_settings(tmp_path):
    """As Kimi K2.5 has it."""
    for content in ({"quantization_config": GPTQ}, {"text_config": {"quantization_config": GPTQ}}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert opening.settings_of(tmp_path) == GPTQ
    for content in ({}, {"text_config": None}, {"text_config": {}}, {"quantization_config": {}}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert opening.settings_of(tmp_path) is None


# --- in memory -------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.device.type != "meta":
            self.nbytes = max(self.nbytes, made.nbytes)
        return made


@pytest.mark.parametrize("make", [made.fp8_experts, made.mxfp4, made.packed_int4_experts])
def test_of_stacked_experts_one_is_in_memory_at_a_time(held, tmp_path, make):
    """Beside the stack itself: codes as 64-bit indices or 32-bit values, and half of the stack of four is more than that."""
    make(tmp_path / "checkpoint")
    found = held(tmp_path / "checkpoint")
    weights = PretrainedWeights(str(tmp_path / "checkpoint"), found.config, torch.bfloat16)
    stacks = [p for p in found.parameters if p.is_experts]
    assert stacks
    for p in stacks:
        stack = torch.empty(p.shape, dtype=torch.bfloat16)
        with Largest() as largest:
            weights.fill(p.name, stack)
        # an expert in float32; views of the stack are as large as the stack
        assert largest.nbytes <= 2 * stack[0].nbytes * (2 if make is made.packed_int4_experts else 1), p.name


def test_a_format_s_tensors_are_named_when_they_are_missing(held, tmp_path):
    made.gptq(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.qweight"))

    with pytest.raises(ConfigError, match=r"lacks tensors .*model\.layers\.0\.mlp\.up_proj\.weight"):
        held(tmp_path)


@pytest.mark.parametrize("make", [made.block_fp8, made.ragged_fp8, made.mxfp8, made.gptq, made.awq])
def test_a_large_weight_is_expanded_in_strips(held, tmp_path, monkeypatch, make):
    """With the same result: here a strip is 64 rows, or one block."""
    make(tmp_path)
    found = held(tmp_path)
    (name,) = [p for p in found.parameters if p.name.endswith("layers.0.mlp.down_proj.weight")]

    def read():
        value = torch.empty(name.shape, dtype=torch.bfloat16)
        weights = PretrainedWeights(str(tmp_path), found.config, torch.bfloat16)
        with Largest() as largest:
            weights.fill(name.name, value)
        return value, largest.nbytes

    at_once, most = read()
    monkeypatch.setattr(expansion, "STRIP_ELEMENTS", 64 * name.shape[1])
    in_strips, less = read()

    assert torch.equal(in_strips, at_once)
    assert less < most
