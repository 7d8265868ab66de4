"""The session class of all engines."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from zi_experiments.config.schema import CacheDevice
from zi_experiments.cost_model.inventory import Inventory, Stored, held, home_on
from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines.base import Routed, ShortPasses


class HFSession:
    """A Hugging Face model that an engine has loaded, on one rank."""

    def __init__(
        self,
        model: Any,
        device: Any,
        cache: Any = None,
        *,
        inventory: Callable[[], Inventory] | None = None,
        parked: Callable[[], AbstractContextManager[None]] = nullcontext,
        short: ShortPasses | None = None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self._device = device
        self._cache = cache  # None: transformers makes a KV cache for each pass
        self._inventory = inventory or partial(in_memory, model)
        self._parked = parked
        self._short = short
        self._close = close
        # transformers would copy the weights of all routed experts in each step, which no plan has room for
        model._optimize_model_for_decode = nullcontext
        if (head := model.get_output_embeddings()) is not None:
            head.register_forward_pre_hook(_contiguous)

    def generate(self, input_ids: Any, gen_len: int, streamer: Any = None) -> Any:
        import torch

        ids = input_ids.to(self._device)
        cache = {} if self._cache is None else {_cache_name(self.model): self._cache}
        if self._cache is not None:
            self._cache.reset()
        with torch.inference_mode(), _greedy(self.model, gen_len) as greedy:
            return self.model.generate(ids, greedy, attention_mask=torch.ones_like(ids), streamer=streamer, **cache)

    def inventory(self) -> Inventory:
        return self._inventory()

    def parked(self) -> AbstractContextManager[None]:
        return self._parked()

    def ways(self) -> list[AbstractContextManager[None]]:
        return self._short.ways() if self._short else [nullcontext()]

    def routed(self) -> Routed | None:
        return self._short.counts() if self._short else None

    def close(self) -> None:
        self._close()


def in_memory(model: Any) -> Inventory:
    """Return the inventory of a model whose parameters are ordinary tensors, or tensors sharded over the ranks."""
    parameters = {name: Stored(numel=p.numel(), home=home_on(p.device)) for name, p in model.named_parameters()}
    local = [getattr(p, "_local_tensor", p) for p in model.parameters()]
    pieces = [(home_on(tensor.device), tensor.untyped_storage().nbytes()) for tensor in local]
    return Inventory(parameters=parameters, held=held(pieces, sum(tensor.nbytes for tensor in local)))


@contextmanager
def _greedy(model: Any, gen_len: int) -> Iterator[Any]:
    """Yield a generation config for exactly `gen_len` greedy tokens, whatever the checkpoint's own config asks for.

    Meanwhile it replaces the model's own config, from which transformers would fill in unset fields. No token ends a
    sequence, so none has to be suppressed.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(max_new_tokens=gen_len, do_sample=False, num_beams=1, use_cache=True)
    try:
        yield model.generation_config
    finally:
        model.generation_config = own


def _cache_name(model: Any) -> str:
    """Return the name of the cache argument of `forward`: state space models have a name of their own."""
    return "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"


def _contiguous(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments with contiguous hidden states of the last tokens, so that `linear` makes one product.

    With a view it makes a product for each sequence, unless the weight requires a gradient, and on a CPU also a copy of
    the head for each sequence: 3 s of a prefill of OPT-1.3B on two cores.
    """
    return (args[0].contiguous(), *args[1:])


def host_cache(plan: Plan, device: Any) -> Any:
    """Return the KV cache of one rank's sequences with `kv_cache=cpu`, or None: the KV cache stays on the device."""
    if plan.run.kv_cache.device is not CacheDevice.cpu:
        return None
    from zi_experiments.engines.host_kv_cache import (
        HostCache,  # it imports transformers' caches, which the launcher does not need
    )

    work = plan.run.workload
    return HostCache(plan.architecture.config, device, plan.largest_share, work.prompt_len + work.gen_len)
