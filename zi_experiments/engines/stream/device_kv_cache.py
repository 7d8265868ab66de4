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


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values are views of the first tokens of larger tensors (batch, heads, capacity, head_dim)."""

    keys: Any
    values: Any

    def __init__(self, capacity: int, sequences: int) -> None:
        super().__init__()
        self._capacity, self._sequences = capacity, sequences
        self._rooms: list[torch.Tensor] = []

    def emptied(self) -> "_RoomyLayer":
        self.keys = self.values = None
        self.is_initialized = False
        return self

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        held = self.get_seq_length()
        total = held + key_states.shape[-2]
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
        if not self._fits(key_states, total):
            self._grow((key_states, value_states), held, total)
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, held:total] = states
        keys, values = (room[:, :, :total] for room in self._rooms)
        self.keys, self.values = keys, values
        return keys, values

    def _fits(self, states: torch.Tensor, total: int) -> bool:
        return bool(self._rooms) and self._rooms[0].shape[0] == states.shape[0] and self._rooms[0].shape[2] >= total

    def _grow(self, new: tuple[torch.Tensor, torch.Tensor], held: int, total: int) -> None:
        old: tuple[Any, Any] = (self.keys, self.values)
        self._rooms = []
        share = min(self._capacity, self._capacity * self._sequences // new[0].shape[0])
        for before, states in zip(old, new, strict=True):
            batch, heads, _, head_dim = states.shape
            room = states.new_empty(batch, heads, max(share, total), head_dim)
            if held:
                room[:, :, :held] = before
            self._rooms.append(room)
