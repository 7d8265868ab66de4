"""Experts that the host computes beside the copies of others: whichever they are, a model computes the same."""

from itertools import combinations

import families
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slabs import by_kernel, compare_kernel_interpreted
from stacks import CPU, EXPERTS, Stack, generated_by, tokens_of

from zi_experiments.engines.stream import expert_share
from zi_experiments.engines.stream.expert_pool import InHostMemory, Pool
from zi_experiments.engines.stream.experts import RoutedExperts
from zi_experiments.engines.stream.few_tokens import FewTokens
from zi_experiments.engines.stream.fixed_pairs import Counts
from zi_experiments.engines.stream.host_experts import HostExperts
from zi_experiments.engines.stream.host_int4 import Int4Linear
from zi_experiments.engines.stream.placement import room
from zi_experiments.measurement.verification import greedy_fraction, verify
from zi_experiments.runtime.progress import silent

SHARES = (0.0, 0.5, 1.0)
TIE = 0.02  # the host's INT4 products round less than expanded weights


@given(st.lists(st.integers(1, 5), max_size=7), st.floats(0, 1))
def test_host_and_copies_end_together(rows, share):
    """No other choice ends earlier."""

    def end(on_host):
        return max((1 - share) * sum(rows[at] / average for at in on_host), share * (len(rows) - len(on_host)))

    average = sum(rows) / max(1, len(rows))
    found = expert_share.chosen(rows, share)
    every = [end(places) for count in range(len(rows) + 1) for places in combinations(range(len(rows)), count)]

    assert len(set(found)) == len(found)
    assert end(found) == pytest.approx(min(every))


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.1, 0), (0.2, 1), (0.5, 4), (0.6, 5), (0.8, 7), (1, 8)])
def test_a_share_of_the_work_is_one_of_equal_experts(share, count):
    assert len(expert_share.chosen([2] * 8, share)) == count


def routed_with_host(stack, pool, share, few=None):
    counts = Counts(CPU)
    host = HostExperts(stack.module, stack.each, stack.experts, torch.bfloat16, share)
    given = stack.module, stack.each, pool.source(0), stack.expanded, few or FewTokens(), counts
    return RoutedExperts(*given, host), counts


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    ("family", "bits"),
    [("mixtral", 16), ("mixtral", 4), ("gpt_oss", 16), ("nemotron_h", 16), ("nemotron_h", 4)],
)
def test_host_and_device_together_compute_what_all_experts_do(family, bits, share):
    stack = Stack(family, bits)
    pool = Pool(InHostMemory([stack.experts]), 6, 6, CPU)
    routed, counts = routed_with_host(stack, pool, share)
    missed = 0
    for seed, count in enumerate([1, 1, 3, 1]):
        states, index, weights = tokens_of(count, seed)
        if seed == 3:
            index[0, 1] = EXPERTS  # none
        expected = stack.module(states, index % EXPERTS, weights.masked_fill(index == EXPERTS, 0))
        missed += len(pool.missing(0, sorted(set(index.flatten().tolist()) - {EXPERTS})))
        with routed.routed():
            found = stack.module(states, index, weights)
        assert (found - expected).float().norm() <= TIE * expected.float().norm()
    assert counts.on_host + pool.copied == missed
    assert (counts.on_host > 0, pool.copied > 0) == (share > 0, share < 1)
    assert counts.on_host_bytes == counts.on_host * stack.each.nbytes


def compare_packed():
    """In a process whose Triton interprets: packed experts in parts of a fixed size, and others on the host."""
    stack = Stack("mixtral", 4)
    pool = Pool(InHostMemory([stack.experts]), 6, 6, CPU)
    with by_kernel():
        routed, counts = routed_with_host(stack, pool, 0.5, FewTokens(packed_experts=9))
        for seed, count in enumerate([1, 3]):
            states, index, weights = tokens_of(count, seed)
            states, weights = states / 4, weights / 4
            expected = stack.module(states, index, weights)
            with routed.routed():
                found = stack.module(states, index, weights)
            error = (found - expected).float().norm() / expected.float().norm()
            assert error <= 0.06, error  # bfloat16 is cut off here, not rounded
    assert routed._fixed is not None
    assert min(counts.on_host, pool.copied) > 0


def test_packed_experts_of_the_device_join_those_of_the_host():
    done = compare_kernel_interpreted(__file__, "compare_packed")

    assert done.returncode == 0, done.stderr[-3000:]


# --- a whole model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """`checkpoint(family)` → the folder of its tiny model."""
    made = {}

    def checkpoint(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "checkpoint"
            families.save_checkpoint(made[family], family, torch.bfloat16)
        return made[family]

    return checkpoint


@pytest.fixture
def load(checkpoint, monkeypatch):
    """`load(family, quant, share, slots)` → a plan with so many experts in a pool, and its session."""
    sessions = []

    def load(family, quant, share, slots):
        monkeypatch.setattr(room, "expert_slots", lambda spec, placed: slots)
        settings = {"offload.compute": share, "workload.batch_size": 1}
        plan, session = families.load(checkpoint(family), quant, "cpu", engine="stream", **settings)
        sessions.append(session)
        return plan, session

    yield load
    for session in sessions:
        session.close()


@pytest.mark.parametrize(
    ("family", "quant", "share", "slots"),
    [
        ("mixtral", "int4", 0, 4),
        ("mixtral", "int4", 0.5, 0),
        ("mixtral", "fp16", 0.5, 4),
        ("mixtral", "int4", 1, 0),
        ("qwen3_moe", "fp16", 0, 0),
        ("qwen3_moe", "int4", 0.5, 4),
        ("qwen3_moe", "fp16", 0.5, 0),
        ("qwen3_moe", "fp16", 1, 8),
    ],
)
def test_tokens_are_those_of_plain_transformers(load, checkpoint, family, quant, share, slots):
    plan, session = load(family, quant, share, slots)
    ids, model = families.IDS[:1], families.plain(checkpoint(family), families.QUANTS[quant])
    expected, chosen = generated_by(model, ids)
    found = session.generate(ids, families.GEN_LEN, None)

    assert plan.storage.host_experts == share
    with torch.inference_mode():
        logits = model(found).logits[:, ids.shape[1] - 1 : -1]
    assert torch.equal(found, expected) or greedy_fraction(found[:, ids.shape[1] :], logits, TIE) == 1
    assert verify(session, plan, silent()).problem is None
    counts = session.routed()
    if counts is None:
        assert (quant, share) == ("fp16", 0), "16-bit experts on a CPU: nothing is brought"
        return
    assert counts.experts >= sum(len(needed) for _, needed in chosen)
    assert (counts.on_host > 0) == (share > 0)
    if share == 1:
        assert counts.copied == 0
    elif share:
        assert counts.on_host < counts.experts


def test_transposed_experts_are_computed_in_16_bits_only(load, checkpoint, monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "gpt_oss", families.FAMILIES["gpt_oss"] | {"num_experts_per_tok": 2})
    _, session = load("gpt_oss", "fp16", 0.5, 4)
    expected, _ = generated_by(families.plain(checkpoint("gpt_oss"), 16), families.IDS[:1])

    assert torch.equal(session.generate(families.IDS[:1], families.GEN_LEN, None), expected)
    assert session.routed().on_host > 0
    plan, session = load("gpt_oss", "int4", 0.5, 4)
    assert session.routed() is not None
    assert plan.storage.host_experts == 0
    assert any("INT4 in groups of 32 to 256 inputs that are not transposed" in note for note in plan.notes)


def test_verification_sees_what_the_host_computes(load):
    plan, session = load("mixtral", "int4", 1, 0)
    experts = session._short._experts[1]._host._experts
    up, down = experts[2]
    experts[2] = up, Int4Linear(down._weight._replace(scales=down._weight.scales / 1.5), None)

    assert "model.layers.1 is the first part of the model that differs" in verify(session, plan, silent()).problem
