"""What surrounds a pass, in which order, and what is kept of it."""

import torch

from zi_experiments.measurement.timing import Pass, Samples, measure_passes, of_ranks
from zi_experiments.runtime.progress import silent


class Session:
    """Counts up, and says when it is asked to."""

    def __init__(self, said):
        self._said = said

    def generate(self, input_ids, gen_len, streamer):
        self._said.append("generate")
        streamer.put(input_ids)
        new = torch.arange(gen_len).expand(len(input_ids), -1)
        for token in new.T:
            streamer.put(token)
        return torch.cat([input_ids, new], dim=1)

    def routed(self):
        return None


def test_counters_are_read_before_the_ranks_wait_and_after_the_last_token():
    said, joules = [], iter(range(100))

    def read():
        said.append("read")
        return {"gpu:a": float(next(joules)), "gpu:b": None}

    passes = measure_passes(
        Session(said),
        torch.zeros(2, 4, dtype=torch.long),
        3,
        count=2,
        phase="measure",
        progress=silent(),
        before_each=lambda: said.append("wait"),
        joules=read,
        keep=lambda tokens: said.append(f"keep {tokens.shape[1]}"),
    )

    assert said == 2 * ["read", "wait", "generate", "keep 3", "read"]
    assert [one.joules for one in passes] == [
        {"gpu:a": (0.0, 1.0), "gpu:b": None},
        {"gpu:a": (2.0, 3.0), "gpu:b": None},
    ]
    assert all(len(one.step_s) == 2 and one.ttft_s <= one.total_s for one in passes)


def test_of_each_pass_the_slowest_rank_counts_and_energy_is_that_of_all_machines():
    counters = {"cpu:package-0": (0.0, 5.0)}
    one = Samples(load_s=1.0, warmup=[], measured=[of(2.0, counters), of(3.0, counters)])
    two = Samples(load_s=4.0, warmup=[], measured=[of(5.0, {}), of(1.0, {})])
    three = Samples(load_s=2.0, warmup=[], measured=[of(1.0, counters | {"gpu:b": None}), of(1.0, counters)])

    together = of_ranks([one, two, three])

    assert together.load_s == 4.0
    assert [each.total_s for each in together.measured] == [5.0, 3.0]
    assert [each.step_s for each in together.measured] == [[5.0], [3.0]]
    assert together.measured[0].joules == counters | {"cpu:package-0@2": (0.0, 5.0), "gpu:b": None}
    assert [[each.total_s for each in rank] for rank in together.ranks] == [[2.0, 3.0], [5.0, 1.0], [1.0, 1.0]]
    assert of_ranks([one]) == one


def of(seconds, joules):
    return Pass(ttft_s=0.5, total_s=seconds, step_s=[seconds], joules=joules)
