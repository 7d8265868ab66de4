"""Only the experts that tokens are routed to are brought, read and expanded, and a model computes the same."""

import os
from dataclasses import replace

import families
import pytest
import tiny
import torch
from slabs import by_kernel, compare_kernel_interpreted
from stacks import CPU, EXPERTS, FAMILIES, Stack, generated_by, tokens_of

from zi_experiments.cost_model import inventory, memory_fit
from zi_experiments.engines import base
from zi_experiments.engines.stream import expert_pool, experts
from zi_experiments.engines.stream.expert_pool import InHostMemory, InPlace, Pool
from zi_experiments.engines.stream.experts import RoutedExperts
from zi_experiments.engines.stream.few_tokens import FewTokens
from zi_experiments.engines.stream.fixed_pairs import Counts
from zi_experiments.engines.stream.placement import room
from zi_experiments.measurement.verification import verify
from zi_experiments.runtime.progress import silent


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("slots", [None, 2, 4, 2 * EXPERTS])
def test_routed_experts_compute_what_all_of_them_do(family, bits, slots):
    layers = [Stack(family, bits) for _ in range(2)]
    pool = slots and Pool(InHostMemory([layer.experts for layer in layers]), slots, min(slots, EXPERTS), CPU)
    sources = [pool.source(number) if pool else InPlace(layer.experts) for number, layer in enumerate(layers)]
    routed = [
        RoutedExperts(layer.module, layer.each, source, layer.expanded, FewTokens(), Counts(CPU))
        for layer, source in zip(layers, sources, strict=True)
    ]
    for seed, count in enumerate([1, 1, 3, 1, 5, 1]):
        for layer, own in zip(layers, routed, strict=True):
            given = tokens_of(count, seed)
            expected = layer.module(*given)
            with own.routed():
                assert torch.equal(layer.module(*given), expected)
            assert torch.equal(layer.module(*given), expected), "and all of them afterwards"


def compare_packed():
    """In a process whose Triton interprets: packed experts in parts of a fixed size, whatever is chosen."""
    for family, bits, slots, together in (("mixtral", 4, None, 1), ("gpt_oss", 4, 6, 1), ("nemotron_h", 8, 6, 4)):
        stack = Stack(family, bits)
        expert_pool.COPIED_TOGETHER = experts.COPIED_TOGETHER = together * stack.each.nbytes
        pool = slots and Pool(InHostMemory([stack.experts]), slots, 6, CPU)
        source, counts = pool.source(0) if pool else InPlace(stack.experts), Counts(CPU)
        with by_kernel():
            routed = RoutedExperts(
                stack.module, stack.each, source, stack.expanded, FewTokens(packed_experts=9), counts
            )
            distinct = 0
            for seed, count in enumerate([1, 3, 3]):
                states, index, weights = tokens_of(count, seed)
                states, weights = states / 4, weights / 4
                index[0, 1] = EXPERTS  # none
                expected = stack.module(states, index % EXPERTS, weights.masked_fill(index == EXPERTS, 0))
                with routed.routed():
                    found = stack.module(states, index, weights)
                error = (found - expected).float().norm() / expected.float().norm()
                assert error <= 0.06, (family, bits, slots, together, error)  # bfloat16 is cut off here, not rounded
                distinct += len(set(index.flatten().tolist()) - {EXPERTS})
            if pool:
                assert counts.total() == (3, distinct)


def test_packed_experts_compute_what_all_of_them_do():
    done = compare_kernel_interpreted(__file__, "compare_packed")

    assert done.returncode == 0, done.stderr[-3000:]


def test_experts_that_are_there_are_not_copied_again():
    stack = Stack("mixtral", 4)
    pool = Pool(InHostMemory([stack.experts] * 2), 8, 2, CPU)

    def bring(layer, experts):
        before = pool.copied
        groups = [(group.experts, group.slabs[group.rows].clone()) for group in pool.bring(layer, experts)]
        for found, slabs in groups:
            assert torch.equal(slabs, stack.experts[found])
        assert sorted(expert for found, _ in groups for expert in found) == experts
        return pool.copied - before

    assert bring(0, [1, 5]) == 2
    assert bring(0, [1, 6]) == 1
    assert bring(1, [1, 5]) == 2, "of another layer"
    assert bring(1, [0, 2]) == 2
    assert bring(0, [2, 5]) == 1
    assert bring(0, [0, 3]) == 2, "its share is four, so the least recently used make room"
    assert bring(0, [1, 6]) == 2
    assert bring(1, [1, 5]) == 0, "and the other layer keeps its own"
    assert bring(0, list(range(8))) >= 4, "more than its share, some at a time"
    assert pool.copied_bytes == pool.copied * stack.experts.shape[1]
    pool.forget()
    assert bring(1, [1, 5]) == 2


def test_a_small_pool_keeps_experts_from_token_to_token():
    """Replacing the least recently used of all layers would always replace what the next layer needs."""
    stack = Stack("mixtral", 4)
    pool = Pool(InHostMemory([stack.experts] * 4), 8, 2, CPU)
    for _ in range(5):
        for layer in range(4):
            list(pool.bring(layer, [0, 1]))

    assert pool.copied == 8


# --- a whole model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("routed") / "checkpoint"
    families.save_checkpoint(found, "mixtral")
    return found


@pytest.fixture
def load(folder, monkeypatch):
    """`load(quant, slots, …)` → a plan with so many experts in a pool, and its session; `cached` ones are of a disk."""
    sessions = []

    def load(quant, slots, cached=0, **settings):
        monkeypatch.setattr(room, "expert_slots", lambda spec, placed: slots)
        monkeypatch.setattr(room, "host_slots", lambda spec, placed: cached)
        offload = "nvme" if cached else "cpu"
        plan, session = families.load(folder, quant, offload, engine="stream", **{"workload.batch_size": 1} | settings)
        sessions.append(session)
        assert plan.storage.routes
        return plan, session

    yield load
    for session in sessions:
        session.close()


def pool_of(session):
    return session._short._pool


def cache_of(session):
    return session._short._cache


TOTAL = 8  # experts of the model: two layers of four


@pytest.mark.parametrize(
    ("quant", "slots", "cached", "settings"),
    [
        ("int4", 0, 0, {}),
        ("int4", 4, 0, {"kv_cache": "cpu"}),
        ("int8", 5, 0, {}),
        ("int4", 8, 0, {"workload.micro_batches": 2}),
        # from disk: in 16 bits an expert is read by several requests
        ("fp16", 0, 4, {}),
        ("fp16", 0, TOTAL, {"workload.micro_batches": 2}),
        ("int8", 0, 4, {"kv_cache": "cpu"}),
        ("int8", 0, 6, {"workload.micro_batches": 2}),
        ("int4", 0, TOTAL, {"kv_cache": "cpu", "workload.micro_batches": 2}),
        ("int4", 4, 4, {}),
        ("fp16", 5, 6, {"kv_cache": "cpu"}),
    ],
    ids=str,
)
def test_a_model_is_plain_transformers_however_its_experts_come(load, quant, slots, cached, settings):
    plan, session = load(quant, slots, cached, **settings)
    checked = verify(session, plan, silent())

    assert checked.passed, checked.problem
    assert checked.tokens_equal
    assert inventory.difference(base.get("stream").stored(plan), session.inventory().parameters) is None
    counts = session.routed()
    assert counts.experts > 0
    assert (counts.copied > 0) == (slots > 0)
    assert counts.copied <= counts.experts
    assert (counts.read > 0) == (0 < cached < TOTAL)
    assert counts.read <= (counts.copied or counts.experts)


@pytest.mark.parametrize("cached", [2, 6, TOTAL])
@pytest.mark.parametrize("quant", ["fp16", "int4"])
def test_what_is_read_is_what_the_router_of_the_plain_model_chooses(load, folder, quant, cached):
    """Two slots keep nothing from a layer's step to its next one, and with six each layer has three experts."""
    ids = families.IDS[:1]
    expected, chosen = generated_by(families.plain(folder, families.QUANTS[quant]), ids)
    _, session = load(quant, 0, cached)
    there = [list(range(cached // 2)) for _ in range(2)]  # filled while the model is loaded

    for _ in range(2):
        before = session.routed()
        assert torch.equal(session.generate(ids, families.GEN_LEN, None), expected)
        counts = session.routed().since(before)
        assert counts.experts == sum(len(needed) for _, needed in chosen)
        read = 0
        for layer, needed in chosen:
            read += len(needed - set(there[layer]))
            kept = [expert for expert in there[layer] if expert not in needed]
            there[layer] = (kept + sorted(needed))[-(cached // 2) :]
        assert counts.read == (counts.experts if cached == 2 else read)
        assert counts.read_bytes == counts.read * cache_of(session).sizes[0]


@pytest.mark.parametrize("cached", [2, 6, TOTAL])
def test_a_prompt_does_not_read_what_host_memory_has(load, monkeypatch, cached):
    plan, session = load("int8", 0, cached)
    moved = []
    read = os.preadv

    def see(descriptor, buffers, offset):
        moved.append(read(descriptor, buffers, offset))
        return moved[-1]

    monkeypatch.setattr(os, "preadv", see)
    with torch.inference_mode():
        logits = session.model(families.IDS).logits
    assert sum(moved) == plan.placement.nvme_bytes - plan.storage.host_cached_bytes == plan.disk_bytes_per_pass
    cache_of(session)._slots.forget()
    moved.clear()
    with torch.inference_mode():
        assert torch.equal(session.model(families.IDS).logits, logits)
    assert sum(moved) == plan.placement.nvme_bytes


@pytest.mark.parametrize("cached", [0, TOTAL])
def test_a_stale_slot_is_caught(load, cached):
    plan, session = load("int4", 0 if cached else TOTAL, cached)
    with session.ways()[1], torch.inference_mode():
        session.model(families.IDS)
    there = cache_of(session) or pool_of(session)
    assert len(there._slots.of(1)) > 1
    first, second, *_ = there._slots.of(1).values()
    there.slabs[[first, second]] = there.slabs[[second, first]]

    assert "model.layers.1 is the first part of the model that differs" in verify(session, plan, silent()).problem


def test_experts_that_cannot_be_read_are_an_error_in_every_pass(load, folder):
    _, session = load("fp16", 0, 2)
    ids = families.IDS[:1]
    session.generate(ids, 3, None)
    (file,) = (folder.parent / "disk").iterdir()
    with file.open("r+b") as opened:
        opened.truncate(0)

    for _ in range(2):
        with session.ways()[1], pytest.raises(OSError, match="preadv moved 0 bytes"), torch.inference_mode():
            session.model(ids)
    session.close()
    assert not file.exists()
    session.close = lambda: None


def test_room_that_is_given_up_is_filled_again(load):
    plan, session = load("int4", 8)
    plan = replace(plan, storage=replace(plan.storage, parked_bytes=1))
    with session.ways()[1], torch.inference_mode():
        expected = session.model(families.IDS).logits
        with session.parked():
            assert pool_of(session).slabs.untyped_storage().nbytes() == 0
        pool_of(session).slabs.fill_(255)
        assert torch.equal(session.model(families.IDS).logits, expected)


# so many layers that the cache is not small beside the buffers in front of the disk
DEEP = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 10, "num_local_experts": 16}


def test_host_memory_that_a_run_may_use_is_what_its_cache_takes(tmp_path, monkeypatch):
    config = tiny.AutoConfig.for_model(
        "mixtral", vocab_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=32, **DEEP
    )
    monkeypatch.setattr(families, "tiny_config", lambda family: config)
    families.save_checkpoint(tmp_path / "checkpoint", "mixtral")
    work = {"workload.batch_size": 1, "workload.prompt_len": 12, "workload.gen_len": families.GEN_LEN}
    read = []
    for resident in (0, "auto"):
        settings = work | {"offload.resident": resident, "hardware.host_memory_gib": 0.015}
        plan, session = families.load(tmp_path / "checkpoint", "int4", "nvme", engine="stream", **settings)
        checked = verify(session, plan, silent())
        assert (checked.problem, checked.tokens_equal) == (None, True)
        assert plan.storage.host_cached_bytes == len(cache_of(session).slabs) * cache_of(session).sizes[0]
        assert memory_fit.uses(plan)[0].total <= plan.machine.host_memory_bytes
        read.append(session.routed().read)
        session.close()
    assert read[0] > 1.2 * read[1] > 0
