"""Weights make room for the reference, and come back as they were."""

from dataclasses import replace

import families
import pytest
import torch

from zi_experiments.engines import base
from zi_experiments.measurement.verification import verify
from zi_experiments.models.structure import decoder_layers
from zi_experiments.runtime.progress import silent


@pytest.fixture(scope="module", params=["int4", "fp16"])
def loaded(request, tmp_path_factory):
    """A plan that parks more than one layer's slab, and its session."""
    folder = tmp_path_factory.mktemp("parking") / "checkpoint"
    families.save_checkpoint(folder, "llama")
    plan, session = families.load(folder, request.param, "cpu", engine="stream", **{"offload.resident": 0.7})
    parked = layers(session)[0].resident.nbytes + 1
    session.close()
    plan, engine = replace(plan, storage=replace(plan.storage, parked_bytes=parked)), base.get("stream")
    session = engine.load(plan, engine.config(plan, []), silent())
    yield plan, session
    session.close()


def layers(session):
    return [module.forward.__self__ for module in decoder_layers(session.model)[1]]


def held(session):
    """Bytes of the layers' slabs, and of the buffer that they are expanded into."""
    slabs = sum(layer.resident.untyped_storage().nbytes() for layer in layers(session))
    return slabs, layers(session)[0]._expanded[0].untyped_storage().nbytes()


def test_what_is_parked_leaves_its_memory_and_comes_back(loaded):
    plan, session = loaded
    with torch.inference_mode():
        expected = session.model(families.IDS).logits
    slabs, expanded = held(session)
    assert slabs > plan.storage.parked_bytes
    assert (expanded > 0) == (plan.run.quant.bits < 16)

    with session.parked():
        left, buffer = held(session)
        assert slabs - left >= plan.storage.parked_bytes
        assert buffer == 0

    assert held(session) == (slabs, expanded)
    with torch.inference_mode():
        assert torch.equal(session.model(families.IDS).logits, expected)


def test_what_is_verified_is_what_runs_afterwards(loaded):
    plan, session = loaded

    assert verify(session, plan, silent()).passed
    with torch.inference_mode():
        before = session.model(families.IDS).logits
        with pytest.raises(RuntimeError, match="stopped"), session.parked():
            raise RuntimeError("stopped")
        assert torch.equal(session.model(families.IDS).logits, before)
