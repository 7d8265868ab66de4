"""Decode steps as CUDA graphs: the host launches a step's operations at once, not one by one.

A step that copies no layer is often over before Python has launched it: 20 ms for OPT-13B in INT4 on an H100, most of which
is launching. Its operations are the same for every token if the KV cache has a fixed size, so they are recorded once.
What depends on the router's choice cannot be recorded: a graph ends at each module of routed experts. It also ends where
weights arrive that do not stay on the device.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol, TypeGuard

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from zi_experiments.engines.stream.device_kv_cache import DeviceCache
from zi_experiments.engines.stream.placement.accounting import windows_slide

ATTENTION = ("sdpa", "eager")
GIVEN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict", "logits_to_keep"}
LENGTH_DEPENDENT = ("dynamic", "longrope")  # rotary tables that are computed anew when a sequence grows


def can_record(model: Any, cache: Any) -> TypeGuard[DeviceCache]:
    """Return whether decode steps of a model on a GPU can be recorded, as far as its configuration tells."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [
        rope,
        *(each for each in rope.values() if isinstance(each, dict)),
    ]  # some models have one for each kind of layer
    return (
        isinstance(cache, DeviceCache)
        and getattr(model, "_can_compile_fullgraph", False)  # transformers' word for steps with equal operations
        and config._attn_implementation in ATTENTION
        and not any(each.get("rope_type") in LENGTH_DEPENDENT for each in ropes)
        and (windows_slide(config) or not any(layer.is_sliding for layer in cache.layers))
    )


class Cutting(Protocol):
    """A part of a model whose work cannot be recorded as a whole."""

    # set while a step is recorded: what the function that it takes does between the operations is done in every step
    cut: Callable[[Callable[[], object]], None] | None


class RecordedSteps:
    """Replaces the `forward` of a model: the first decode step of a number of sequences is computed, the second recorded.

    Only prompts without padding are supported, which is all that a run has.
    """

    def __init__(
        self, model: Any, cache: DeviceCache, cutting: Sequence[Cutting], graphs: type["Graphs"] | None = None
    ) -> None:
        """`cutting` does something between operations of a step."""
        self._cache, self._cutting, self._graphs = cache, cutting, graphs or Graphs
        self._config = model.config.get_text_config()
        self._forward = model.forward
        self._seen: tuple[int, ...] | None = None  # sequences and rooms of the last step
        self._step: _Step | None = None  # recorded for them
        self._is_recordable = True

        @wraps(self._forward)  # `generate` looks at the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run(*args, **kwargs)

        model.forward = forward

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if args or not self._is_step(kwargs):
            return self._forward(*args, **kwargs)
        ids: torch.Tensor = kwargs["input_ids"]
        key = (len(ids), *self._cache.rooms())
        if key != self._seen:  # this step compiles kernels, and allocates what libraries keep
            self._seen, self._step = key, None
            return self._forward(**kwargs)
        step = self._step = self._step or self._recorded(ids, "position_ids" in kwargs)
        if step is None:
            return self._forward(**kwargs)
        step.ids.copy_(ids)
        step.position.fill_(self._cache.get_seq_length())
        step.graphs.run()
        self._cache.advance()
        return CausalLMOutputWithPast(logits=step.logits, past_key_values=self._cache)

    def forget(self) -> None:
        """Record the next step anew: what it reads and writes may be elsewhere by then."""
        self._seen = self._step = None

    def _is_step(self, kwargs: dict[str, Any]) -> bool:
        ids = kwargs.get("input_ids")
        if (
            not self._is_recordable
            or ids is None
            or ids.shape[1] != 1
            or kwargs.get("past_key_values") is not self._cache
        ):
            return False
        used = {name for name, value in kwargs.items() if value is not None}
        return used <= GIVEN and self._cache.has_room()

    def _recorded(self, ids: torch.Tensor, takes_positions: bool) -> "_Step | None":
        """Return the recorded step; None for a model with operations that cannot be recorded: no step is from then on."""
        try:
            return self._record(ids, takes_positions)
        except Exception as error:  # of any operation of any model
            logging.getLogger(__name__).warning("decode steps are not recorded: %s", error)
            self._is_recordable = False
            return None

    def _record(self, ids: torch.Tensor, takes_positions: bool) -> "_Step":
        """Return a step with its own inputs and outputs, recorded without being computed."""
        position = torch.tensor([self._cache.get_seq_length()], device=ids.device)
        step = _Step(ids=ids.clone(), position=position, graphs=self._graphs(ids.device))

        def forward() -> torch.Tensor:
            given = {"input_ids": step.ids, "past_key_values": _Whole(self._cache, position), "use_cache": True}
            given["attention_mask"] = _masks(self._config, self._cache, len(ids), position)
            if takes_positions:
                given["position_ids"] = position.expand(len(ids), 1)
            logits: torch.Tensor = self._forward(**given).logits
            return logits

        for one in self._cutting:
            one.cut = step.graphs.cut
        try:
            step.logits = step.graphs.record(forward)
        finally:
            for one in self._cutting:
                one.cut = None
        return step


@dataclass
class _Step:
    ids: torch.Tensor  # (sequences, 1)
    position: torch.Tensor  # (1,): tokens in the KV cache
    graphs: "Graphs"
    logits: Any = None


class Graphs:
    """Graphs with functions between them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts: list[tuple[Any, Callable[[], object]]] = []
        self._last: Any = None
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the result's tensor, which `run` fills."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._begin()
            try:
                return forward()
            finally:
                self._last.capture_end()
                torch.cuda.current_stream(self._device).wait_stream(stream)

    def _begin(self) -> None:
        self._last = torch.cuda.CUDAGraph()
        # threads that read from disk and pin memory go on meanwhile
        self._last.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def cut(self, between: Callable[[], object]) -> None:
        """End a graph, and begin another one; `between` is called between them, each time that they run."""
        self._last.capture_end()
        self._parts.append((self._last, between))
        self._begin()

    def run(self) -> None:
        for graph, between in self._parts:
            graph.replay()
            between()
        self._last.replay()


def _masks(config: Any, cache: DeviceCache, sequences: int, position: torch.Tensor) -> Any:
    """Return which tokens of the rooms attention sees, those written so far: for all layers, or for each kind of them."""
    kinds = getattr(config, "layer_types", None) or [""] * len(cache.layers)
    sizes = {kind: layer.rooms[0].shape[2] for kind, layer in zip(kinds, cache.layers, strict=False)}
    masks = {}
    for kind, size in sizes.items():
        # made in the step itself: a step does not keep what it reads
        mask = torch.arange(size, device=position.device) <= position
        if config._attn_implementation == "eager":
            dtype = cache.layers[0].rooms[0].dtype
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        masks[kind] = mask.expand(sequences, 1, 1, size)
    return masks if len(masks) > 1 else next(iter(masks.values()))


class _Whole(Cache):  # type: ignore[misc]
    """The whole rooms of a KV cache; each layer writes its token at a position that is on the device."""

    def __init__(self, cache: DeviceCache, position: torch.Tensor) -> None:
        # a room that the position is beyond is a ring
        places = {size: position % size for size in {layer.rooms[0].shape[2] for layer in cache.layers}}
        super().__init__(layers=[_WholeLayer(layer, places[layer.rooms[0].shape[2]]) for layer in cache.layers])


class _WholeLayer(DynamicLayer):  # type: ignore[misc]
    def __init__(self, layer: Any, place: torch.Tensor) -> None:
        super().__init__()
        self._rooms, self._place, self.is_initialized = layer.rooms, place, True
        self.is_sliding = layer.is_sliding

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        for room, states in zip(self._rooms, (keys, values), strict=True):
            room.index_copy_(2, self._place, states)
        return tuple(self._rooms)

    def get_seq_length(self) -> int:
        return int(self._rooms[0].shape[2]) - 1  # with the new token, all of the room

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self._rooms[0].shape[2]), 0
