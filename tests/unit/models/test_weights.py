import pytest
import tiny
import torch
from families import save_checkpoint, tiny_config
from transformers import AutoModelForCausalLM

from zi_experiments.config.schema import ConfigError
from zi_experiments.models import description
from zi_experiments.models.weights import PretrainedWeights, RandomWeights

SHAPES = {
    "model.embed_tokens.weight": (128, 32),
    "model.layers.0.mlp.up_proj.weight": (64, 32),
    "model.layers.1.mlp.up_proj.weight": (64, 32),
    "model.layers.1.mlp.experts.down_proj": (4, 32, 64),
}


def filled(name, shape, *, weights=None, dtype=torch.bfloat16):
    """A parameter of a model; before, it holds what memory happens to hold."""
    tensor = torch.full(shape, torch.nan, dtype=dtype)
    (weights or RandomWeights(0)).fill(name, tensor)
    return tensor


def test_a_name_has_the_same_values_in_any_order():
    one, other = RandomWeights(0), RandomWeights(0)
    forward = {name: filled(name, shape, weights=one) for name, shape in SHAPES.items()}
    backward = {name: filled(name, shape, weights=other) for name, shape in reversed(SHAPES.items())}

    assert all(torch.equal(forward[name], backward[name]) for name in SHAPES)


def test_a_name_has_the_same_values_again():
    weights = RandomWeights(0)
    first, again = (filled("model.layers.0.mlp.up_proj.weight", (64, 32), weights=weights) for _ in range(2))

    assert torch.equal(first, again)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"])
def test_another_layer_or_module_of_the_same_shape_differs(name):
    assert not torch.equal(filled(name, (64, 32)), filled("model.layers.0.mlp.up_proj.weight", (64, 32)))


@pytest.mark.parametrize("seed", [1, 10, -1])
def test_another_seed_is_another_model(seed):
    for name, shape in SHAPES.items():
        assert not torch.equal(filled(name, shape), filled(name, shape, weights=RandomWeights(seed)))


def test_the_global_generator_has_no_part_in_it():
    torch.manual_seed(1)
    first = filled("weight", (16, 16))
    torch.manual_seed(2)
    state = torch.get_rng_state()

    assert torch.equal(first, filled("weight", (16, 16)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("shape", "fan_in"), [((2048, 256), 256), ((64, 4096), 4096), ((4, 256, 1024), 1024)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrices_are_normal_with_the_inverse_root_of_fan_in(shape, fan_in, dtype):
    matrix = filled("weight", shape, dtype=dtype)

    assert matrix.dtype == dtype
    assert matrix.isfinite().all()
    assert matrix.float().std().item() == pytest.approx(fan_in**-0.5, rel=0.02)
    assert matrix.float().mean().item() == pytest.approx(0, abs=0.02 * fan_in**-0.5)


@pytest.mark.parametrize(
    ("name", "value"), [("model.norm.weight", 1), ("model.layers.0.fc1.bias", 0), ("model.norm.bias", 0)]
)
def test_norms_are_one_and_biases_zero(name, value):
    vector = filled(name, (32,))

    assert torch.equal(vector, torch.full_like(vector, value))


def test_activations_stay_finite_at_any_depth():
    """In float16, with a hundred layers and no norm between them."""
    hidden = torch.randn(4, 256, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    for layer in range(100):
        hidden = hidden @ filled(f"layers.{layer}.weight", (256, 256), dtype=torch.float16).float().T

    assert 1e-2 < hidden.std() < 1e2


# --- a checkpoint's --------------------------------------------------------------------------------------------------


@pytest.fixture
def pretrained():
    """`pretrained(folder, config)` → the weights of a checkpoint, closed when the test is over."""
    opened = []

    def pretrained(folder, config, dtype=torch.bfloat16):
        opened.append(PretrainedWeights(str(folder), config, dtype))
        return opened[-1]

    yield pretrained
    for weights in opened:
        weights.close()


@pytest.mark.parametrize(
    ("family", "layout"),
    [("llama", "safetensors"), ("llama", "sharded"), ("llama", "bin"), ("opt", "safetensors"), ("mixtral", "sharded")],
)
def test_a_checkpoint_has_the_values_that_plain_transformers_loads(pretrained, tmp_path, family, layout):
    """OPT's head is tied; a checkpoint of Mixtral holds one tensor for each expert."""
    save_checkpoint(tmp_path, family, torch.float16, layout=layout)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    weights = pretrained(tmp_path, tiny_config(family))

    parameters = description.describe(tiny_config(family), family).parameters
    assert {p.name for p in parameters} == {name for name, _ in plain.named_parameters()}
    for p in parameters:
        assert torch.equal(filled(p.name, p.shape, weights=weights), plain.get_parameter(p.name)), p.name


def test_what_a_checkpoint_holds_besides_parameters(pretrained, tmp_path):
    """Gemma 4 scales each layer's output by a number that is a buffer."""
    model = AutoModelForCausalLM.from_config(tiny.config("gemma4_text"), dtype=torch.bfloat16)
    stored = {f"model.layers.{index}.layer_scalar": 0.5 + index for index in range(4)}
    for name, value in stored.items():
        model.get_buffer(name).fill_(value)
    model.save_pretrained(tmp_path)

    buffers = pretrained(tmp_path, tiny.config("gemma4_text")).buffers()

    assert {name: buffers[name].item() for name in stored} == stored


@pytest.mark.parametrize(("family", "layout"), [("llama", "bin"), ("mixtral", "sharded")])
def test_reading_a_checkpoint_writes_nothing(tmp_path, monkeypatch, family, layout):
    """Not even of experts, which are stacked, or of pickles."""
    save_checkpoint(tmp_path / "checkpoint", family, layout=layout)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint").iterdir()}
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))

    weights = PretrainedWeights(str(tmp_path / "checkpoint"), tiny_config(family), torch.float16)
    for p in description.describe(tiny_config(family), family).parameters:
        filled(p.name, p.shape, weights=weights, dtype=torch.float16)
    weights.close()

    assert list(scratch.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint").iterdir()} == before


def test_a_checkpoint_without_a_weight_is_refused_by_its_name(tmp_path):
    """For every engine that reads one: transformers would make the weight up, for the reference too."""
    save_checkpoint(tmp_path, "llama", torch.float32, layout="bin")
    state = torch.load(tmp_path / "pytorch_model.bin")
    del state["model.layers.1.mlp.up_proj.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")

    with pytest.raises(ConfigError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        PretrainedWeights(str(tmp_path), tiny_config("llama"), torch.bfloat16)
