"""Layers that the host computes in decode steps: whichever they are, the model computes what plain transformers does."""

import pytest
import torch
from families import FAMILIES, IDS, LAYERS, VOCABULARY, load, outputs, plain
from slabs import compare_kernel_interpreted, expanded, packed
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from zi_experiments.engines.stream import host_product
from zi_experiments.engines.stream.host_int4 import Int4Linear
from zi_experiments.engines.stream.host_product import MOST_ROWS, HostLinear
from zi_experiments.engines.stream.quantized import packed_views
from zi_experiments.measurement.verification import greedy_fraction, verify
from zi_experiments.models.structure import decoder_layers
from zi_experiments.runtime import progress

COUNT = 5
TIE = 0.02  # the host's INT4 products round less than expanded weights
# as they differ to a layer: a bias for positions as a tensor, rotary tables as a tuple, positions alone, neither
CASES = [
    # family, share on the host, KV cache, micro-batches; the layers
    ("opt", 0.5, "gpu", 1, (2, 4)),
    ("opt", 1, "cpu", 2, (0, 1, 2, 3, 4)),
    ("llama", 0.3, "gpu", 2, (2, 4)),
    ("bloom", 0.7, "gpu", 1, (1, 2, 3, 4)),
    ("qwen3", 0.5, "cpu", 1, (2, 4)),
    ("gpt2", 0.5, "gpu", 1, (2, 4)),
    ("gemma2", 0.7, "gpu", 1, (1, 2, 3, 4)),
    ("mixtral", 0.5, "gpu", 1, (2, 4)),  # in whole layers: so many sequences need nearly all experts
    ("llama", 0, "gpu", 1, ()),
]


def save(folder, family):
    numbers = {"vocab_size": VOCABULARY, **FAMILIES[family], LAYERS.get(family, "num_hidden_layers"): COUNT}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **numbers), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """`checkpoint(family)` → its folder, and the logits and tokens of plain transformers."""
    made = {}

    def checkpoint(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "checkpoint"
            save(folder, family)
            made[family] = folder, *outputs(plain(folder, 16))
        return made[family]

    return checkpoint


@pytest.fixture
def loaded(checkpoint):
    """`loaded(family, share, …)` → plan, session, and the numbers of layers that the host has computed."""
    sessions = []

    def loaded(family, share, kv_cache="gpu", micro_batches=1, quant="fp16"):
        settings = {"offload.compute": share, "workload.batch_size": 16, "workload.micro_batches": micro_batches}
        plan, session = load(checkpoint(family)[0], quant, "cpu", kv_cache, "stream", **settings)
        sessions.append(session)
        return plan, session, watched(session.model)

    yield loaded
    for session in sessions:
        session.close()


def watched(model):
    """A list that grows by the number of each layer that is computed on the host."""
    seen = []
    for index, layer in enumerate(decoder_layers(model)[1]):
        host = layer.forward.__self__._host
        if host is not None:
            host._module.register_forward_pre_hook(lambda *_, index=index: seen.append(index))
    return seen


@pytest.mark.parametrize(("family", "share", "kv_cache", "micro_batches", "layers"), CASES)
def test_tokens_are_those_of_plain_transformers(checkpoint, loaded, family, share, kv_cache, micro_batches, layers):
    _, logits, tokens = checkpoint(family)
    plan, session, seen = loaded(family, share, kv_cache, micro_batches)

    assert plan.storage.host_layers == layers
    for _ in range(2):  # again: after decode steps another prompt begins
        seen.clear()
        with torch.inference_mode():
            assert torch.equal(session.model(IDS).logits, logits)
        assert seen == []  # the GPU computes prompts
        assert torch.equal(session.generate(IDS, 6, None), tokens)
        blocks = min(micro_batches, len(IDS))
        assert seen == [index for _ in range(5) for index in layers for _ in range(blocks)]
    assert verify(session, plan, progress.silent()).problem is None


def test_verification_sees_what_the_host_computes(loaded):
    plan, session, seen = loaded("llama", 0.5)
    weight = decoder_layers(session.model)[1][2].forward.__self__._host._module.mlp.down_proj
    weight.weight = torch.nn.Parameter(weight.weight * 1.5, requires_grad=False)

    assert "layers.2 is the first part of the model that differs" in verify(session, plan, progress.silent()).problem
    assert seen


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_int4_is_multiplied_as_it_is_packed(checkpoint, family, loaded):
    folder, *_ = checkpoint(family)
    _, tokens = outputs(plain(folder, 4))
    plan, session, seen = loaded(family, 0.5, quant="int4")
    found = session.generate(IDS, 6, None)

    assert seen
    with torch.inference_mode():
        logits = session.model(found).logits[:, IDS.shape[1] - 1 : -1]
    assert torch.equal(found, tokens) or greedy_fraction(found[:, IDS.shape[1] :], logits, TIE) == 1
    assert verify(session, plan, progress.silent()).problem is None
    kinds = {type(module) for module in decoder_layers(session.model)[1][2].forward.__self__._host._module.modules()}
    assert Int4Linear in kinds
    assert torch.nn.Linear not in kinds


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 17])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("blocks", [1, 3, 20])
def test_int4_products_are_rounded_once(blocks, dtype, group_size, rows):
    """Of 53 rows of one group to more groups than a vector has floats; some have groups of equal weights."""
    generator = torch.Generator().manual_seed(1)
    weight, x, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((53, blocks * group_size), (rows, 1, blocks * group_size), (53,))
    )
    weight[3, :group_size] = 0.5
    slab, layout = packed({"up.weight": weight}, 4, group_size, 1)
    codes, scale, low = (part.double() for part in packed_views(slab, layout, dtype)["up.weight"])
    codes = torch.stack([codes // 16, codes % 16], -1).view(53, -1, group_size)
    exact = (codes / scale[..., None] + low[..., None]).flatten(1)
    product = Int4Linear(packed_views(slab, layout, dtype)["up.weight"], torch.nn.Parameter(bias, requires_grad=False))(
        x
    )
    wanted = x.double() @ exact.T + bias.double()

    assert product.dtype is dtype
    assert torch.allclose(product.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-4 * wanted.std().item())
    expanded_weight = expanded(slab, layout, dtype)["up.weight"].double()
    assert (exact - expanded_weight).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max(), "the same weights"


@pytest.mark.parametrize("rows", [1, 2, 3, 5, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_rounded_once(with_bias, dtype, rows):
    """Of 53 rows, which neither blocks nor tiles divide."""
    generator = torch.Generator().manual_seed(1)
    linear = torch.nn.Linear(384, 53, with_bias).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(rows, 1, 384, generator=generator).to(dtype)
    product, wanted = HostLinear(linear.to(dtype))(x), linear.double()(x.double())

    assert product.dtype is dtype
    assert torch.allclose(product.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_products_take_inputs_however_they_lie_in_memory():
    linear = torch.nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(64, 3, dtype=torch.bfloat16).T

    assert torch.allclose(HostLinear(linear)(x).float(), linear(x).float(), rtol=1e-2, atol=1e-2)


def test_layers_in_32_bits_keep_torch_s_products():
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64, dtype=torch.bfloat16), torch.nn.Linear(64, 64))
    host_product.use(layers)

    assert [type(layer) for layer in layers] == [HostLinear, torch.nn.Linear]


def test_weights_are_there_once(loaded):
    _, session, _ = loaded("llama", 0.5)
    layer = decoder_layers(session.model)[1][2].forward.__self__
    slab = layer._source._store.slab(layer._index)

    for parameter in layer._host._module.parameters():
        assert slab.data_ptr() <= parameter.data_ptr() < slab.data_ptr() + slab.nbytes


def test_what_fails_on_the_host_is_raised(loaded):
    """It fails in the thread that computes there; later passes are right."""
    _, session, _ = loaded("llama", 0.5)
    tokens, module = session.generate(IDS, 6, None), decoder_layers(session.model)[1][4].forward.__self__._host._module

    def fail(*_):
        raise ArithmeticError("a layer on the host")

    hook = module.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="a layer on the host"):
        session.generate(IDS, 6, None)
    hook.remove()

    assert torch.equal(session.generate(IDS, 6, None), tokens)


def test_a_cache_that_the_host_cannot_append_to_is_computed_on_the_gpu(checkpoint, loaded):
    tokens = checkpoint("llama")[2]
    _, session, seen = loaded("llama", 0.5)
    assert torch.equal(session.generate(IDS, 6, None), tokens)
    seen.clear()

    with torch.inference_mode():
        cache = DynamicCache(config=session.model.config)
        for ids in (IDS, tokens[:, IDS.shape[1] : IDS.shape[1] + 1]):
            last = session.model(ids, past_key_values=cache).logits[:, -1]

    assert seen == []
    assert torch.equal(last.argmax(-1), tokens[:, IDS.shape[1] + 1])


def compare_kernel():
    """Runs where Triton interprets."""
    from zi_experiments.engines.stream.pinned_kernel import BLOCK, read

    for dtype in (torch.float16, torch.bfloat16):
        for shape in ((1, 1, 3), (2, 1, BLOCK), (3, 1, BLOCK + 1)):
            states = torch.randn(shape).to(dtype)
            assert torch.equal(read(states, torch.device("cpu")), states)


def test_what_the_host_computes_is_read_as_it_is():
    done = compare_kernel_interpreted(__file__)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("pointer", ["*fp16", "*bf16"])
def test_the_kernel_compiles_without_a_gpu(pointer):
    """The interpreter accepts what the compiler does not."""
    import triton
    from triton.backends.compiler import GPUTarget

    from zi_experiments.engines.stream import pinned_kernel

    signature = {"source": pointer, "target": pointer, "count": "i32", "block": "constexpr"}
    source = triton.compiler.ASTSource(
        fn=pinned_kernel._copy, signature=signature, constexprs={"block": pinned_kernel.BLOCK}
    )
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
