"""What the sessions of all engines do to a model."""

import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zi_experiments.engines.session import HFSession


class Products(TorchDispatchMode):
    """The matrix products that are computed, by name and columns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.seen.append((func.overloadpacket.__name__, out.shape[-1]))
        return out


def test_the_head_is_one_product_for_the_whole_batch():
    """And not one for each sequence, with a copy of the head for each: the last tokens of prompts are not in one piece."""
    session = HFSession(tiny.model("opt").requires_grad_(False), "cpu")

    with torch.no_grad(), Products() as products:
        logits = session.model(tiny.prompts(3, 5), logits_to_keep=1).logits

    assert [name for name, columns in products.seen if columns == logits.shape[-1]] == ["mm"]
