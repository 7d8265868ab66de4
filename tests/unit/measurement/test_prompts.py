import pytest
import torch

from zi_experiments.measurement.prompts import prompts


def batch(**changes):
    return prompts(**({"batch_size": 12, "prompt_len": 64, "vocab_size": 1000, "seed": 0} | changes))


def test_shape_and_type():
    ids = batch()

    assert ids.shape == (12, 64)
    assert ids.dtype == torch.int64


def test_a_seed_is_a_batch():
    assert torch.equal(batch(seed=3), batch(seed=3))
    assert not torch.equal(batch(seed=3), batch(seed=4))


def test_the_global_generator_has_no_part_in_it():
    torch.manual_seed(1)
    first, state = batch(), torch.get_rng_state()
    torch.manual_seed(2)

    assert torch.equal(first, batch())
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_ids_are_in_the_vocabulary_and_never_special():
    ids = batch(batch_size=100, vocab_size=50)

    assert ids.min() == 4
    assert ids.max() == 49


def test_sequences_differ():
    assert len({tuple(sequence.tolist()) for sequence in batch()}) == 12


def test_a_vocabulary_too_small_for_special_ids():
    ids = batch(batch_size=100, vocab_size=8)

    assert ids.min() == 0
    assert ids.max() == 7


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 12])
def test_the_ranks_together_hold_the_same_sequences(ranks):
    shares = [batch(rank=rank, ranks=ranks) for rank in range(ranks)]

    assert {len(share) for share in shares} == {12 // ranks}
    assert torch.equal(torch.cat(shares), batch())
