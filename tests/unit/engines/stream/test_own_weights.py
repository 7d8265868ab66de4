"""Weights that are not experts and do not fit on the device cross alone in routed steps, and a model computes the same."""

import families
import pytest
import tiny
import torch
from crossed import crossed

from zi_experiments.cost_model import inventory
from zi_experiments.engines import base
from zi_experiments.engines.stream import routing
from zi_experiments.engines.stream.placement import choice, fitting, parts, room
from zi_experiments.measurement.timing import Pass, Samples
from zi_experiments.measurement.verification import verify
from zi_experiments.results.metrics import as_routed
from zi_experiments.runtime.progress import silent

LAYERS, EXPERTS, ROUTED = 8, 8, 2
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": LAYERS,
    "num_experts_per_tok": ROUTED,
}
CONFIGS = {
    "mixtral": SHAPE | {"num_local_experts": EXPERTS, "intermediate_size": 128},
    # the first layer has no experts
    "qwen3_moe": SHAPE
    | {"num_experts": EXPERTS, "moe_intermediate_size": 64, "intermediate_size": 64, "mlp_only_layers": [0]},
}
IDS = families.IDS[:1]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """`checkpoints(family)` → its folder."""
    made = {}

    def checkpoint(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "checkpoint"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(families, "tiny_config", lambda name: tiny.AutoConfig.for_model(name, **CONFIGS[name]))
                families.save_checkpoint(made[family], family)
        return made[family]

    return checkpoint


@pytest.fixture
def load(checkpoints, monkeypatch):
    """`load(family, quant, offload, share, slots)` → a plan and its session, with room for a share of what is no expert.

    In place of a GPU's memory: so many experts have a place in a pool or, from disk, in a cache. With "nvme, cpu" they have
    it in a pool, in front of a cache that has all: on a CPU, 16-bit experts in host memory are not brought one by one.
    Steps bring routed experts, whether that is the faster way on this machine or not.
    """
    sessions = []

    def load(family, quant, offload, share, slots, **settings):
        def room_of(spec):
            layers = parts.layers_of(spec)
            whole = fitting.split(spec, layers, [layer.experts for layer in layers], in_parts=True)
            streamed = [(*layer.experts, *layer.own_bytes) for layer in layers]
            least = fitting.split(spec, layers, streamed, in_parts=True)
            most, least = (sum(x.resident.nbytes for x in p) + room.buffer_bytes(spec, p) for p in (whole, least))
            assert least < most, "otherwise nothing is gained by what crosses"
            return int(least + share * (most - least))

        copied, read = {"cpu": (slots, 0), "nvme": (0, slots), "nvme, cpu": (slots, LAYERS * EXPERTS)}[offload]
        offload = offload.partition(",")[0]
        monkeypatch.setattr(room, "device_room", room_of)
        monkeypatch.setattr(choice, "_is_faster", lambda *_: True)
        monkeypatch.setattr(room, "expert_slots", lambda spec, placed: copied)
        monkeypatch.setattr(room, "host_slots", lambda spec, placed: read)
        settings = {"workload.batch_size": 1} | settings
        plan, session = families.load(checkpoints(family), quant, offload, engine="stream", **settings)
        sessions.append(session)
        return plan, session

    yield load
    for session in sessions:
        session.close()


def reference(folder, quant):
    model = families.plain(folder, families.QUANTS[quant])
    with torch.no_grad():
        return model(IDS).logits, families.generate(model, IDS)


# slots for what a layer needs of four verified sequences, and more
COUNTS = {"none": EXPERTS, "one expert": EXPERTS + 1, "half": LAYERS * EXPERTS // 2}


PLACES = [("int4", "cpu"), ("int4", "nvme"), ("fp16", "nvme"), ("fp16", "nvme, cpu")]


@pytest.mark.parametrize(("family", "place", "count"), crossed(tuple(CONFIGS), PLACES, tuple(COUNTS)))
def test_a_model_is_plain_transformers_with_other_weights_than_experts_away(load, checkpoints, family, place, count):
    quant, offload = place
    logits, tokens = reference(checkpoints(family), quant)
    plan, session = load(family, quant, offload, 0.3, COUNTS[count])
    checked = verify(session, plan, silent())
    assert (checked.problem, checked.tokens_equal) == (None, True)
    assert inventory.difference(base.get("stream").stored(plan), session.inventory().parameters) is None

    for way in session.ways():
        with way, torch.inference_mode():
            found = session.model(IDS).logits.float()
        assert (found - logits).norm() <= 1e-2 * logits.float().norm()
    assert session.routed().own_bytes > 0
    for _ in range(2):  # the second prompt finds the ring where the first one's steps have left it
        before = session.routed()
        assert torch.equal(session.generate(IDS, families.GEN_LEN, None), tokens)
        counts, steps = session.routed().since(before), families.GEN_LEN - 1
        assert counts.own_bytes == steps * plan.storage.own_bytes_per_step > 0, "as planned, and none of a prompt"


@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_what_a_run_moves_is_what_its_plan_says(load, monkeypatch, offload):
    """With slots for a layer's step only, no expert is there when it is needed again."""
    monkeypatch.setattr(routing, "VERIFIED_SEQUENCES", 1)
    plan, session = load("mixtral", "int4", offload, 0.5, ROUTED)
    session.generate(IDS, families.GEN_LEN, None)
    before = session.routed()
    session.generate(IDS, families.GEN_LEN, None)
    counts, steps = session.routed().since(before), families.GEN_LEN - 1
    one = Pass(ttft_s=1.0, total_s=2.0, step_s=[0.1] * steps, routed=counts)
    given = as_routed(plan, Samples(load_s=1.0, warmup=[], measured=[one]))
    moved = counts.own_bytes + (counts.copied_bytes or counts.read_bytes)
    planned = "streamed_bytes_per_step" if offload == "cpu" else "disk_bytes_per_step"

    assert getattr(plan, planned) * steps == getattr(given, planned) * steps == moved
