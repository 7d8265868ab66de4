"""KV cache of the stream engine, allocated for the whole pass at the start, so that no decode step allocates."""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from zi_experiments.config.schema import CacheDevice
from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines.hf_session import host_cache
from zi_experiments.engines.stream.micro_batches import BlockCache


def make_cache(plan: Plan, device: torch.device) -> Cache | None:
    """Return the KV cache of one rank's sequences, one part per micro-batch; None: the model makes its own."""
    if plan.architecture.has_own_cache:
        return None
    blocks = plan.run.workload.micro_batches
    parts = [_part(plan, device) for _ in range(blocks)]
    return BlockCache(parts) if blocks > 1 else parts[0]


def _part(plan: Plan, device: torch.device) -> Cache:
    if plan.run.kv_cache.device is CacheDevice.cpu:
        return host_cache(plan, device)
    work = plan.run.workload
    sequences = work.batch_size // plan.run.hardware.num_gpus
    return DeviceCache(plan.architecture.config, work.prompt_len + work.gen_len, sequences)


class DeviceCache(Cache):  # type: ignore[misc]
    """A KV cache on the device: room for `capacity` tokens of each of `sequences`; it grows when a pass needs more.

    More sequences share that room, so that the verification of a run takes no more memory than the run.
    Layers other than full attention, such as sliding windows, stay as transformers makes them.
    """

    layers: list[Any]

    def __init__(self, config: Any, capacity: int, sequences: int) -> None:
        self._config = config.get_text_config(decoder=True)
        self._capacity, self._sequences = capacity, sequences
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forget all tokens, but keep the allocated room."""
        kept = {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, _RoomyLayer)}
        self.layers = DynamicCache(config=self._config).layers
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = (
                    kept[index].emptied() if index in kept else _RoomyLayer(self._capacity, self._sequences)
                )

    def has_room(self) -> bool:
        """Return whether all layers have keys and values, and room for another token."""
        return all(isinstance(layer, _RoomyLayer) and layer.has_room() for layer in self.layers)

    def room(self) -> tuple[int, ...]:
        """Return where the room of the first layer is, and for how many tokens: it is another one after it has grown."""
        return (self.layers[0].rooms[0].data_ptr(), self.layers[0].rooms[0].shape[2])

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
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, self.held : total] = states
        self.held = total
        self.keys, self.values = (room[:, :, :total] for room in self.rooms)
        return self.keys, self.values

    def _fits(self, states: torch.Tensor, total: int) -> bool:
        return bool(self.rooms) and self.rooms[0].shape[0] == states.shape[0] and self.rooms[0].shape[2] >= total

    def _grow(self, new: tuple[torch.Tensor, torch.Tensor], total: int) -> None:
        old, self.rooms = self.rooms, []
        share = min(self._capacity, self._capacity * self._sequences // new[0].shape[0])
        for index, states in enumerate(new):
            batch, heads, _, head_dim = states.shape
            # what attention masks must be finite: it is multiplied by zero
            room = states.new_zeros(batch, heads, max(share, total), head_dim)
            if self.held:
                room[:, :, : self.held] = old[index][:, :, : self.held]
            self.rooms.append(room)
