"""benchmarks/timeline.py: what a trace is reduced to. (Recording one needs a GPU.)"""

import json

import picture
import pytest
import timeline
from places import ROOT

STEP, LAYER = 100_000.0, 5000.0


def event(name, at, took, category="kernel", **args):
    return {"ph": "X", "name": name, "ts": at, "dur": took, "cat": category, "args": args}


def routed_step(start):
    """A step of 12 layers, each of which computes, reads its choice back, copies two experts and multiplies them."""
    yield event(timeline.TOKEN, start, 0, "user_annotation")
    yield event("Memcpy DtoH (Device -> Pinned)", start + 10, 1, "gpu_memcpy", bytes=1)  # is it the last token?
    for layer in range(timeline.ROUTED_LAYERS):
        at = start + 100 + layer * LAYER
        yield event("gemm", at, 200)
        yield event("Memcpy DtoH (Device -> Pinned)", at + 210, 2, "gpu_memcpy", bytes=16)
        for turn in range(2):
            copied = at + 300 + turn * 2000
            yield event("Memcpy HtoD (Pinned -> Device)", copied, 1900, "gpu_memcpy", bytes=99 << 20)
            yield event("Memcpy HtoD (Pinned -> Device)", copied + 1901, 1, "gpu_memcpy", bytes=64)
            yield event("_by_rows", copied + 1910, 50)
            yield event("_by_rows", copied + 1965, 25)


def test_lanes_of_routed_experts():
    events = [*routed_step(0), *routed_step(STEP), event(timeline.TOKEN, 2 * STEP, 0, "user_annotation")]

    found = timeline.reduce_routed(events)

    # up to the choice of the layer after those that are drawn
    assert found["end_us"] == 100 + timeline.DRAWN * LAYER + 210
    assert [layer for *_, layer in found["link"]] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [at for at, _ in found["read back"]] == [310 + layer * LAYER for layer in range(timeline.DRAWN)]
    assert found["experts"][:2] == [[2310, 80], [4310, 80]]
    assert found["compute"][:2] == [[100, 200], [100 + LAYER, 200]]


@pytest.mark.parametrize("name", ["timeline", "timeline-experts"])
def test_pictures_are_drawn_of_what_was_recorded(name):
    recorded = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())

    assert picture.draw(recorded) == (ROOT / "docs" / f"{name}.svg").read_text()


def test_all_lanes_and_the_axis_fit():
    lanes = {lane: [[0.0, 1000.0]] for lane in picture.LANES}
    recorded = lanes | {"expert_bytes": 1e6, "tokens_us": [0.0], "end_us": 2000.0}

    drawn = picture.draw({"model": "a model", "quants": {"int4": recorded}})

    height = int(drawn.partition('height="')[2].partition('"')[0])
    assert max(int(each.partition('"')[0]) for each in drawn.split(' y="')[1:]) < height
