import pytest
import torch
from torch import nn

from zi_experiments.weights import RandomWeights


def filled(*shapes, seed=0, name="weight", dtype=torch.bfloat16):
    """Parameters of these shapes, one after the other from one seed; before, they hold what memory happens to hold."""
    weights = RandomWeights(seed)
    parameters = [nn.Parameter(torch.full(shape, torch.nan, dtype=dtype), requires_grad=False) for shape in shapes]
    for parameter in parameters:
        weights.fill(name, parameter)
    return parameters


def test_a_seed_is_a_model():
    first, again, other = filled((64, 32), (8, 64)), filled((64, 32), (8, 64)), filled((64, 32), (8, 64), seed=1)

    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_layers_of_one_shape_differ():
    one, two = filled((64, 32), (64, 32))

    assert not torch.equal(one, two)


def test_the_global_generator_has_no_part_in_it():
    torch.manual_seed(1)
    (first,) = filled((16, 16))
    torch.manual_seed(2)

    assert torch.equal(first, *filled((16, 16)))


@pytest.mark.parametrize(("shape", "fan_in"), [((2048, 256), 256), ((64, 4096), 4096), ((4, 256, 1024), 1024)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrices_are_normal_with_the_inverse_root_of_fan_in(shape, fan_in, dtype):
    (matrix,) = filled(shape, dtype=dtype)

    assert matrix.dtype == dtype
    assert matrix.isfinite().all()
    assert matrix.float().std().item() == pytest.approx(fan_in**-0.5, rel=0.02)
    assert matrix.float().mean().item() == pytest.approx(0, abs=0.02 * fan_in**-0.5)


def test_norms_are_one_and_biases_zero():
    (norm,), (bias,) = filled((32,)), filled((32,), name="bias")

    assert torch.equal(norm, torch.ones_like(norm))
    assert torch.equal(bias, torch.zeros_like(bias))


def test_activations_stay_finite_at_any_depth():
    """In float16, with a hundred layers and no norm between them."""
    hidden = torch.randn(4, 256, dtype=torch.float32)
    for matrix in filled(*[(256, 256)] * 100, dtype=torch.float16):
        hidden = hidden @ matrix.float().T

    assert 1e-2 < hidden.std() < 1e2
