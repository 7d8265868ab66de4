"""The block schedule: several micro-batches go through a layer, one after the other, while it is on the device."""

from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
from transformers.cache_utils import Cache


class BlockCache(Cache):  # type: ignore[misc]
    """One KV cache per micro-batch. Outside the layers the model sees the first one: all have the same length."""

    def __init__(self, parts: list[Cache]) -> None:
        super().__init__(layers=parts[0].layers)
        self.parts = parts

    def reset(self) -> None:
        for part in self.parts:
            part.reset()
        self.layers = self.parts[0].layers


def in_blocks(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> Any:
    """Return what `forward` returns for the whole batch, computed one micro-batch at a time."""
    batch = (args[0] if args else kwargs["hidden_states"]).shape[0]
    blocks = max(count for count in range(1, blocks + 1) if batch % count == 0)
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    if (blocks == 1 and not caches) or not all(isinstance(cache, BlockCache) for cache in caches):
        return forward(*args, **kwargs)
    joined = None
    for block in range(blocks):
        mine = _block(args, batch, blocks, block), _block(kwargs, batch, blocks, block)
        joined = _put(joined, forward(*mine[0], **mine[1]), blocks, block)
    return joined


def _block(value: Any, batch: int, blocks: int, block: int) -> Any:
    """Return a micro-batch's part of a layer's argument: its rows of tensors with one or more rows per sequence."""
    if isinstance(value, tuple | list):
        return type(value)(_block(one, batch, blocks, block) for one in value)
    if isinstance(value, dict):
        return {key: _block(one, batch, blocks, block) for key, one in value.items()}
    if isinstance(value, BlockCache):
        return value.parts[block]
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] % batch == 0:
        rows = value.shape[0] // blocks
        return value[block * rows : (block + 1) * rows]
    return value


def _put(whole: Any, part: Any, blocks: int, block: int) -> Any:
    """Return the whole batch's output with one micro-batch's `part` in its place; the first part allocates it."""
    if isinstance(part, torch.Tensor):
        rows = part.shape[0]
        joined = part.new_empty(blocks * rows, *part.shape[1:]) if whole is None else whole
        joined[block * rows : (block + 1) * rows] = part
        return joined
    if isinstance(part, tuple):
        wholes = repeat(None) if whole is None else whole
        return tuple(_put(one, mine, blocks, block) for one, mine in zip(wholes, part, strict=False))
    return part if whole is None else whole
