"""KV cache of the stream engine, allocated for the whole pass at the start, so that no decode step allocates."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from zi_experiments.config.schema import CacheDevice
from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines.host_kv_cache import HostCache, HostLayer, host_layers
from zi_experiments.engines.stream.micro_batches import BlockCache


def make_cache(plan: Plan, device: torch.device) -> Cache | None:
    """Return the KV cache of one rank's sequences, one part per micro-batch; None: the model makes its own."""
    if plan.architecture.has_own_cache:
        return None
    blocks = plan.run.workload.micro_batches
    parts = [_part(plan, device) for _ in range(blocks)]
    return BlockCache(parts) if blocks > 1 else parts[0]


def _part(plan: Plan, device: torch.device) -> Cache:
    tokens = plan.run.workload.prompt_len + plan.run.workload.gen_len
    on_host = plan.storage.host_layers
    if plan.run.kv_cache.device is CacheDevice.cpu:
        return HostCache(plan.architecture.config, device, plan.largest_share, tokens, on_host)
    config = plan.architecture.config.get_text_config(decoder=True)
    own = host_layers(config, device, plan.largest_share, tokens, on_host)
    return DeviceCache(plan.architecture.config, tokens, plan.largest_share, own)


class DeviceCache(Cache):  # type: ignore[misc]
    """A KV cache on the device: room for `capacity` tokens of each of `sequences`; it grows when a pass needs more.

    More sequences share that room, so that the verification of a run takes no more memory than the run.
    Layers other than full attention and sliding windows stay as transformers makes them. Those of `on_host`, by their
    numbers, are in host memory.
    """

    layers: list[Any]

    def __init__(self, config: Any, capacity: int, sequences: int, on_host: dict[int, HostLayer] | None = None) -> None:
        self._config = config.get_text_config(decoder=True)
        self._capacity, self._sequences, self._on_host = capacity, sequences, on_host or {}
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forget all tokens, but keep the allocated room."""
        kept = {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, _RoomyLayer)}
        self.layers = DynamicCache(config=self._config).layers
        for index, layer in enumerate(self.layers):
            if index in self._on_host:
                self.layers[index] = self._on_host[index]
                self.layers[index].reset()
            elif index in kept:
                self.layers[index] = kept[index].emptied()
            elif type(layer) is DynamicLayer:
                self.layers[index] = _RoomyLayer(self._capacity, self._sequences)
            elif type(layer) is DynamicSlidingWindowLayer:
                self.layers[index] = _WindowLayer(self._capacity, self._sequences, layer.sliding_window)

    def has_room(self) -> bool:
        """Return whether all layers have keys and values, and room for another token."""
        return all(isinstance(layer, _RoomyLayer) and layer.has_room() for layer in self.layers)

    def rooms(self) -> tuple[int, ...]:
        """Return where the rooms of the layers are: they are elsewhere after they have grown."""
        return tuple(layer.rooms[0].data_ptr() for layer in self.layers)

    def advance(self) -> None:
        """Count a token that was written to the rooms of all layers."""
        for layer in self.layers:
            layer.held += 1


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values are the first tokens of larger tensors (batch, heads, capacity, head_dim)."""

    def __init__(self, capacity: int, sequences: int) -> None:
        super().__init__()
        self._capacity, self._sequences = capacity, sequences
        self.rooms: list[torch.Tensor] = []
        self.held = 0  # tokens

    def emptied(self) -> "_RoomyLayer":
        self.held, self.is_initialized = 0, False
        return self

    def has_room(self) -> bool:
        return self.is_initialized and 0 < self.held < self.rooms[0].shape[2]

    def get_seq_length(self) -> int:
        return self.held

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = self.held + key_states.shape[-2]
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
        if not self._fits(key_states, total):
            self._grow((key_states, value_states), total)
        self.keys, self.values = self._append((key_states, value_states), total)
        self.held = total
        return self.keys, self.values

    def _append(self, new: tuple[torch.Tensor, torch.Tensor], total: int) -> Iterator[torch.Tensor]:
        """Write keys and values into the rooms. Yield what attention reads."""
        for room, states in zip(self.rooms, new, strict=True):
            room[:, :, self.held : total] = states
            yield room[:, :, :total]

    def _fits(self, states: torch.Tensor, total: int) -> bool:
        return bool(self.rooms) and self.rooms[0].shape[0] == states.shape[0] and self.rooms[0].shape[2] >= total

    def _grow(self, new: tuple[torch.Tensor, torch.Tensor], total: int) -> None:
        old, self.rooms = self.rooms, []
        for index, states in enumerate(new):
            batch, heads, _, head_dim = states.shape
            # what attention masks must be finite: it is multiplied by zero
            room = states.new_zeros(batch, heads, self._size(batch, total), head_dim)
            if self.held:
                room[:, :, : self.held] = old[index][:, :, : self.held]
            self.rooms.append(room)

    def _size(self, batch: int, total: int) -> int:
        """Return for how many tokens there is to be room, of so many sequences with so many tokens each."""
        return max(min(self._capacity, self._capacity * self._sequences // batch), total)


class _WindowLayer(_RoomyLayer):
    """The same with a sliding window: room for its tokens, in a ring, where the latest replaces the oldest."""

    is_sliding = True

    def __init__(self, capacity: int, sequences: int, window: int) -> None:
        super().__init__(capacity, sequences)
        self.sliding_window = window

    def has_room(self) -> bool:
        return self.is_initialized and self.held > 0 and (self._is_ring() or self.held < self.rooms[0].shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        before = min(self.held, self.sliding_window - 1)
        return before + query_length, self.held - before

    def _append(self, new: tuple[torch.Tensor, torch.Tensor], total: int) -> Iterator[torch.Tensor]:
        size, device, known = self.rooms[0].shape[2], new[0].device, min(self.held, self.sliding_window - 1)
        before = torch.arange(self.held - known, self.held, device=device) % size
        kept = torch.arange(max(self.held, total - size), total, device=device) % size
        for room, states in zip(self.rooms, new, strict=True):
            earlier = room.index_select(2, before)
            room.index_copy_(2, kept, states[:, :, -len(kept) :])
            yield torch.cat([earlier, states], 2)  # in the order of the tokens

    def _fits(self, states: torch.Tensor, total: int) -> bool:
        return super()._fits(states, total) or (self._is_ring() and self.rooms[0].shape[0] == states.shape[0])

    def _is_ring(self) -> bool:
        return bool(self.rooms) and self.rooms[0].shape[2] == self.sliding_window

    def _size(self, batch: int, total: int) -> int:
        return min(self.sliding_window, super()._size(batch, total))
