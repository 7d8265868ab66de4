"""Run as a script, since DeepSpeed keeps state: what verification says of a loaded model in which one thing is wrong.

python faults.py FOLDER, a line of JSON (engine, family, fault, problem) for each
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from families import load, save_checkpoint, slabs_of

from zi_experiments.models.structure import decoder_layers


@contextmanager
def changed(session, name, change):
    """One stored parameter, changed in place for a while."""
    stored = session.model.get_parameter(name).ds_tensor
    before = stored.clone()
    change(stored)
    yield session
    stored.copy_(before)


def an_eighth_is_zero(stored):
    stored[: stored.numel() // 8] = 0


def scales_in_float16(stored, bits=4, group_size=64):
    """What DeepSpeed alone makes of a float16 checkpoint in a bfloat16 run: scales whose bits are of the other type."""
    groups = stored.numel() * 16 // (bits * group_size + 2 * 16)
    scales = stored[-2 * groups : -groups]
    scales.copy_(scales.half().view(torch.bfloat16))


def not_a_number(stored):
    stored[-1] = float("nan")


@contextmanager
def both_layers(session):
    with (
        changed(session, "model.layers.0.mlp.up_proj.weight", an_eighth_is_zero),
        changed(session, "model.layers.1.mlp.up_proj.weight", an_eighth_is_zero),
    ):
        yield session


@contextmanager
def other_tokens(session):
    """A cache that loses what it holds: tokens that have nothing to do with the prompt."""

    def generate(ids, gen_len, streamer):
        return torch.cat([ids, session.generate(ids.flip(1), gen_len, None)[:, ids.shape[1] :]], dim=1)

    yield SimpleNamespace(model=session.model, generate=generate, parked=session.parked, ways=session.ways)


@contextmanager
def changed_slab(session, index, change):
    """What is streamed of one layer, changed in place for a while; `change` is given its integers, scales and minima."""
    layer = decoder_layers(session.model)[1][index].forward.__self__
    slab = layer._source._store.take(layer._index)
    before = slab.clone()
    codes, scales, minima = (slab[region] for region in layer._placed.streamed.regions)
    change(codes, scales.view(torch.bfloat16), minima.view(torch.bfloat16))
    yield session
    slab.copy_(before)


def an_eighth_of_the_codes_is_zero(codes, scales, minima):
    codes[: codes.numel() // 8] = 0


def a_scale_is_a_hundredth(codes, scales, minima):
    scales[100] /= 100


def a_minimum_is_not_a_number(codes, scales, minima):
    minima[-1000] = float("nan")


@contextmanager
def changed_resident(session, index):
    slab = decoder_layers(session.model)[1][index].forward.__self__.resident
    before = slab.clone()
    slab[: slab.numel() // 8] = 0
    yield session
    slab.copy_(before)


@contextmanager
def slabs_exchanged(session):
    """Each layer is given the other one's weights, as if one slot had been overtaken."""
    slabs = slabs_of(session)
    slabs.reverse()
    yield session
    slabs.reverse()


FAULTS = {
    ("stream", "llama"): {
        "nothing": lambda session: changed_slab(session, 0, lambda *parts: None),
        "integers": lambda session: changed_slab(session, 1, an_eighth_of_the_codes_is_zero),
        "a scale": lambda session: changed_slab(session, 1, a_scale_is_a_hundredth),
        "a minimum": lambda session: changed_slab(session, 0, a_minimum_is_not_a_number),
        "what stays": lambda session: changed_resident(session, 1),
        "exchanged": slabs_exchanged,
        "tokens": other_tokens,
    },
    ("deepspeed", "llama"): {
        "nothing": lambda session: changed(session, "lm_head.weight", lambda stored: None),
        "layer 1": lambda session: changed(session, "model.layers.1.mlp.up_proj.weight", an_eighth_is_zero),
        "both layers": both_layers,
        "scales of another type": lambda session: changed(
            session, "model.layers.1.self_attn.o_proj.weight", scales_in_float16
        ),
        "not a number": lambda session: changed(session, "model.layers.0.mlp.down_proj.weight", not_a_number),
        "embedding": lambda session: changed(session, "model.embed_tokens.weight", an_eighth_is_zero),
        "head": lambda session: changed(session, "lm_head.weight", an_eighth_is_zero),
        "tokens": other_tokens,
    },
    ("deepspeed", "mixtral"): {
        "nothing": lambda session: changed(session, "lm_head.weight", lambda stored: None),
        "an expert": lambda session: changed(session, "model.layers.1.mlp.experts.down_proj", an_eighth_is_zero),
        "tokens": other_tokens,
    },
}


def main() -> None:
    from zi_experiments.measurement.verification import verify
    from zi_experiments.runtime import progress

    folder = Path(sys.argv[1])
    for family in {family for _, family in FAULTS}:
        save_checkpoint(folder / family / "checkpoint", family)
    for (engine, family), faults in FAULTS.items():
        settings = {"offload.resident": 0.5} if engine == "stream" else {}
        plan, session = load(folder / family / "checkpoint", "int4", "cpu", engine=engine, **settings)
        for fault, put in faults.items():
            with put(session) as faulty:
                problem = verify(faulty, plan, progress.silent()).problem
            print(json.dumps([engine, family, fault, problem]), flush=True)
        session.close()


if __name__ == "__main__":
    main()
