"""KV cache in host memory, for `kv_cache=cpu`: a layer's part is copied to the GPU while the layer before computes.

Layers that the host computes in decode steps have theirs here too, and read it in place.
"""

from collections.abc import Collection
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from zi_experiments.runtime.pinned_memory import pinned_empty

Pair = tuple[torch.Tensor, torch.Tensor]  # keys, values


class HostCache(Cache):  # type: ignore[misc]
    """A KV cache for `model.generate(…, past_key_values=cache)`; `reset()` makes it ready for the next pass.

    It has room for `sequences` of `capacity` tokens each, and grows when a pass needs more. The first pass pins the
    host memory, layer by layer. The GPU holds the KV cache of two layers: the one that computes, and the next.
    Layers other than full and sliding-window attention stay as transformers makes them. There is no beam search.
    """

    layers: list[Any]

    def __init__(
        self,
        config: Any,
        device: torch.device | str,
        sequences: int,
        capacity: int,
        on_host: Collection[int] = (),
    ) -> None:
        """`on_host` has the layers that the host computes in decode steps."""
        self._config = config.get_text_config(decoder=True)
        layers = DynamicCache(config=self._config).layers
        made = host_layers(self._config, device, sequences, capacity, range(len(layers)))
        fetched = [layer for index, layer in made.items() if index not in on_host]
        for layer, following in zip(fetched, fetched[1:] + fetched[:1], strict=True):
            layer.following = following
        super().__init__(layers=[made.get(index, layer) for index, layer in enumerate(layers)])

    def reset(self) -> None:
        """Forget all tokens. Layers from transformers are made anew: not all of them accept another batch size."""
        made = DynamicCache(config=self._config).layers
        self.layers = [old if isinstance(old, HostLayer) else new for old, new in zip(self.layers, made, strict=True)]
        super().reset()


def host_layers(
    config: Any, device: torch.device | str, sequences: int, capacity: int, wanted: Collection[int]
) -> dict[int, "HostLayer"]:
    """Return those of the `wanted` layers' caches that can be in host memory, by layer; none of them is fetched ahead."""
    slots = _Slots(torch.device(device), handed_on=bool(getattr(config, "num_kv_shared_layers", 0)))
    found = {}
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if index in wanted and type(layer) is DynamicLayer:
            found[index] = HostLayer(slots, None, sequences * capacity)
        elif index in wanted and type(layer) is DynamicSlidingWindowLayer:
            # with room for two windows, a full buffer is rewritten from its front at most once per window
            tokens = min(capacity, 2 * layer.sliding_window)
            found[index] = HostLayer(slots, layer.sliding_window, sequences * tokens)
    return found


class HostLayer(CacheLayerMixin):  # type: ignore[misc]
    """KV cache of one layer: keys and values each in a flat buffer, time-major: (tokens, batch, heads, head_dim).

    The tokens to attend to are contiguous for every batch size, so they cross PCIe in one copy.
    """

    def __init__(self, slots: "_Slots", window: int | None, room: int) -> None:
        super().__init__()
        self.is_sliding = window is not None
        self.following = self  # the next layer; after the last comes the first, for the next token
        self._slots = slots
        self._window = window
        self._room = room  # tokens that fit in the buffers, of all sequences together
        self._sizes: list[int] = []  # elements of one token of all sequences: keys, values
        self._arrived: torch.cuda.Event | None = None  # tokens from the GPU are in the buffers
        self.on_host = False  # True while the host computes the layer
        self.reset()

    def reset(self) -> None:
        self.held = 0  # tokens that new ones attend to
        self._start = 0  # index of the first of them in the buffers
        self._left = 0  # tokens that have left the window
        self._slots.forget()

    def get_seq_length(self) -> int:
        return self._left + self.held

    def get_max_length(self) -> int:
        return -1 if self._window is None else self._window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, self._left

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (
            self._slots.host_empty(self._room * states.shape[1] * states.shape[3], states.dtype)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Pair:
        """Return keys and values that new tokens attend to, their own last: (batch, heads, tokens, head_dim) each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        states = key_states, value_states
        return self._append(states) if self.on_host else self._slots.join(self, states)

    def _append(self, states: Pair) -> Pair:
        """Write new tokens of the host into the buffers, and return views of all tokens there."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        new = states[0].shape[2]
        total = self.held + new
        self._sizes = [one.numel() // new for one in states]
        if (self._start + total) * states[0].shape[0] > self._room:
            self._move_to_front(states, total)
        joined = []
        for buffer, one, size in zip((self.keys, self.values), states, self._sizes, strict=True):
            batch, heads, _, width = one.shape
            tokens = buffer[self._start * size : (self._start + total) * size].view(total, batch, heads, width)
            tokens[self.held :] = one.permute(2, 0, 1, 3)
            joined.append(tokens.permute(1, 2, 0, 3))
        kept = total if self._window is None else min(total, self._window - 1)
        self._start += total - kept
        self._left += total - kept
        self.held = kept
        return joined[0], joined[1]

    def _move_to_front(self, states: Pair, total: int) -> None:
        """Make room for `total` tokens: those that are held move to the front of the buffers, or of larger ones."""
        held = [
            buffer[self._start * size : (self._start + self.held) * size].clone()
            for buffer, size in zip((self.keys, self.values), self._sizes, strict=True)
        ]
        if total * states[0].shape[0] > self._room:
            self._room = 2 * total * states[0].shape[0]
            self.lazy_initialization(*states)
        for buffer, tokens in zip((self.keys, self.values), held, strict=True):
            buffer[: len(tokens)] = tokens
        self._start = 0

    def pretend(self, tokens: int) -> None:
        """Count so many tokens as held, and compute the layer on the host: to measure how long it takes."""
        self.on_host, self._start = True, 0
        if self.is_initialized:
            self.keys.fill_(0.5)  # memory that nobody has written to is read faster
            self.values.fill_(0.5)
        self.held = tokens if self._window is None else min(tokens, self._window - 1)
        self._left = tokens - self.held

    def fetch(self, slot: Pair) -> None:
        """Copy the held tokens to the front of a slot."""
        if self.held:
            for target, buffer, size in zip(slot, (self.keys, self.values), self._sizes, strict=True):
                held = buffer[self._start * size : (self._start + self.held) * size]
                target[: self.held * size].copy_(held, non_blocking=True)

    def store(self, joined: Pair, new: int) -> None:
        """Append the last `new` tokens of a slot. Without room for them, write all tokens to keep to the front."""
        batch, _, total, _ = joined[0].shape
        held = total if self._window is None else min(total, self._window - 1)
        appended = (self._start + total) * batch <= self._room
        count, at = (new, self._start + total - new) if appended else (held, 0)
        if held * batch > self._room:
            self._slots.synchronize()  # copies from the old buffers may still run
            self._room = 2 * held * batch
            self.lazy_initialization(*joined)
        self._sizes = [states.numel() // total for states in joined]
        for buffer, states, size in zip((self.keys, self.values), joined, self._sizes, strict=True):
            written = states[:, :, total - count :].permute(2, 0, 1, 3)
            buffer[at * size : (at + count) * size].view(written.shape).copy_(written, non_blocking=True)
        self._start = self._start + total - held if appended else 0
        self._left += total - held
        self.held = held
        self._arrived = self._slots.launched()


class _Slots:
    """Two GPU buffers, each for the KV cache of one layer, and the stream that copies to and from them.

    With `handed_on`, some layers read the keys and values of an earlier one. Its slot is overwritten by then, so all
    layers get copies.
    """

    def __init__(self, device: torch.device, handed_on: bool) -> None:
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        nothing = torch.empty(0, device=device)
        self._slots = (nothing, nothing), (nothing, nothing)
        self._fetched: HostLayer | None = None  # its tokens are in the first slot, or being copied there
        self._handed_on = handed_on

    def __del__(self) -> None:
        self.synchronize()  # a fetch for a token that was never computed may still read host memory

    def synchronize(self) -> None:
        if self._side is not None:
            self._side.synchronize()

    def launched(self) -> torch.cuda.Event | None:
        """Return an event for the copies launched so far; None on a CPU."""
        return self._side.record_event() if self._side is not None else None

    def host_empty(self, numel: int, dtype: torch.dtype) -> Any:
        return torch.empty(numel, dtype=dtype) if self._side is None else pinned_empty(numel, dtype)

    def forget(self) -> None:
        self._fetched = None

    def join(self, layer: HostLayer, states: Pair) -> Pair:
        """Return a layer's tokens with the new ones behind them; store the new ones, and fetch the next layer's tokens.

        The side stream runs its copies in order: tokens are in host memory before they are fetched again, and have left
        a slot before another layer's tokens are copied into it. Three waits order it and the compute stream.
        """
        side = self._side
        compute = torch.cuda.current_stream(side.device) if side is not None else None
        self._make_room(layer, states, compute)
        current, other = self._slots
        self._slots = other, current
        # 1. Attention of the layer before, the last to read `other`, is launched: a fetch into `other` waits for it.
        _wait(side, compute)
        with torch.cuda.stream(side):
            if self._fetched is not layer:
                layer.fetch(current)
            # 2. This layer's tokens are in `current`, and those of the layer that had it before are stored. Only then
            #    are new ones written and all of them read, without a wait for the next layer's fetch, launched below.
            _wait(compute, side)
            self._fetched = layer.following if layer.following is not layer else None
            if self._fetched is not None:
                self._fetched.fetch(other)
        joined = _append(current[0], layer.held, states[0]), _append(current[1], layer.held, states[1])
        # 3. New tokens are written before they are stored.
        _wait(side, compute)
        with torch.cuda.stream(side):
            layer.store(joined, states[0].shape[2])
        return (joined[0].clone(), joined[1].clone()) if self._handed_on else joined

    def _make_room(self, layer: HostLayer, states: Pair, compute: torch.cuda.Stream | None) -> None:
        """Make both slots large enough for a layer's host buffers, and for all tokens that it has now."""
        old, total = self._slots[0], layer.held + states[0].shape[2]
        sizes = [
            max(slot.numel(), buffer.numel(), total * new[:, :, 0].numel())
            for slot, buffer, new in zip(old, (layer.keys, layer.values), states, strict=True)
        ]
        if sizes != [slot.numel() for slot in old]:
            _wait(compute, self._side)  # later operations may get the memory of the old slots
            first, second = ((states[0].new_empty(sizes[0]), states[1].new_empty(sizes[1])) for _ in self._slots)
            self._slots = first, second
            self.forget()


def _append(slot: torch.Tensor, held: int, new: torch.Tensor) -> torch.Tensor:
    """Write new tokens behind those in a slot; return a view of all of them: (batch, heads, tokens, head_dim)."""
    batch, heads, count, head_dim = new.shape
    size = (held + count) * batch * heads * head_dim
    joined = slot[:size].view(held + count, batch, heads, head_dim).permute(1, 2, 0, 3)
    joined[:, :, held:] = new
    return joined


def _wait(later: torch.cuda.Stream | None, earlier: torch.cuda.Stream | None) -> None:
    """Let later operations on stream `later` wait for those launched so far on `earlier`; None on a CPU."""
    if later is not None and earlier is not None:
        later.wait_stream(earlier)
