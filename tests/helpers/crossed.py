"""Combinations of settings, of which `make test` takes so many that each pair of values meets."""

from itertools import combinations, product

import pytest


def crossed(*axes):
    """All combinations as pytest's parameters; those that show no new pair of values wait for `make test-all`."""
    pairs = {each: set(combinations(enumerate(each), 2)) for each in product(*(range(len(axis)) for axis in axes))}
    missing, chosen = set().union(*pairs.values()), set()
    while missing:
        chosen.add(best := max(pairs, key=lambda each: len(pairs[each] & missing)))
        missing -= pairs[best]
    return [
        pytest.param(*values, marks=() if each in chosen else pytest.mark.release)
        for each, values in zip(pairs, product(*axes), strict=True)
    ]
