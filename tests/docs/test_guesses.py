"""benchmarks/guesses.py: how often the next layer's router guesses its experts one layer early."""

import guesses
import torch
from torch import nn


class TopKRouter(nn.Module):
    """Chooses the experts of the two largest states, shifted by a number."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, states):
        found = states.roll(self.shift, -1).topk(2)
        return states, found.values, found.indices


class Layers(nn.Module):
    def __init__(self, *shifts):
        super().__init__()
        self.routers = nn.ModuleList(map(TopKRouter, shifts))

    def forward(self, *states):
        for router, each in zip(self.routers, states, strict=True):
            router(each)


def states(*largest):
    made = torch.zeros(1, 8)
    made[0, list(largest)] = 1.0
    return made


def test_guesses_by_hand():
    model = Layers(0, 1, 0)
    counted = guesses.Guesses(model)

    model(states(0, 1), states(0, 5), states(1, 5))
    # the second router makes {1, 2} of the first one's states, and {1, 6} of its own; the third {0, 5}, and {1, 5}
    assert (counted.pairs, counted.experts, counted.right) == (2, 2, 2)

    model(states(2, 3), states(2, 3), states(4, 5))
    assert (counted.pairs, counted.right) == (4, 2 + 2 + 0), (
        "the last layer of a token guesses nothing of the next token"
    )


def test_prompts_are_left_out():
    model = Layers(0, 0)
    counted = guesses.Guesses(model)

    model(*[states(0, 1).expand(3, 8)] * 2)

    assert counted.pairs == 0
