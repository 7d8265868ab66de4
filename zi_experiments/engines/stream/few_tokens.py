"""Passes of few tokens are computed in another way than long ones: a decode step does not need all that a prompt needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import inf


@dataclass
class FewTokens:
    """The most tokens of a pass, over all sequences, up to which it is computed in each of these ways."""

    routed: float = 0  # only the experts that tokens are routed to are brought
    packed: float = 0  # resident weights are multiplied as they are packed, and not expanded
    packed_experts: float = 0  # the same of routed experts: tokens for each of them, on average
    on_host: float = 0  # layers that the host computes are computed there: new tokens of each sequence

    @contextmanager
    def always(self, applies: bool) -> Iterator[None]:
        """Compute all passes in these ways in the context, or none."""
        usual = asdict(self)
        for name, most in usual.items():
            setattr(self, name, inf if applies and most else 0)
        try:
            yield
        finally:
            vars(self).update(usual)
