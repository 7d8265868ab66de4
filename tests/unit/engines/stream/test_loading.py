"""Memory while weights are loaded into slabs."""

from concurrent.futures import ThreadPoolExecutor

from torch.profiler import ProfilerActivity, profile

from zi_experiments.engines import base
from zi_experiments.engines.stream import loading
from zi_experiments.runtime.progress import silent

SHAPE = ("model=opt-125m", "model.architecture.vocab_size=1024", "model.architecture.num_hidden_layers=3")


class InThisThread(ThreadPoolExecutor):
    """The profiler sees the memory of one thread."""

    map = staticmethod(map)


def test_loading_takes_no_more_than_what_is_loaded(make_plan, machine, monkeypatch):
    """On the device a layer is quantized in the room of the buffer that layers are expanded into later."""
    monkeypatch.setattr(loading, "ThreadPoolExecutor", InThisThread)
    plan = make_plan(*SHAPE, "engine=stream", "offload=none", "quant=int4", "hardware=cpu", on=machine("cpu"))
    engine = base.get("stream")

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        session = engine.load(plan, engine.config(plan, []), silent())
    session.close()

    live = peak = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    loaded = plan.weight_bytes + plan.storage.host_buffer_bytes
    assert loaded <= live <= peak < 1.1 * loaded
