"""What the sessions of all engines have in common."""

from collections.abc import Callable
from functools import partial
from typing import Any

from zi_experiments.config import CacheDevice
from zi_experiments.inventory import Inventory, Stored, held, home_on
from zi_experiments.plan import Plan


class HFSession:
    """A Hugging Face model that an engine has made ready, on one rank."""

    def __init__(
        self,
        model: Any,
        device: Any,
        cache: Any = None,
        *,
        inventory: Callable[[], Inventory] | None = None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self._device = device
        self._cache = cache  # None: one of transformers' own for each pass
        self._inventory = inventory or partial(in_memory, model)
        self._close = close
        if (head := model.get_output_embeddings()) is not None:
            head.register_forward_pre_hook(_contiguous)

    def generate(self, input_ids: Any, gen_len: int, streamer: Any = None) -> Any:
        import torch

        ids = input_ids.to(self._device)
        if self._cache is not None:
            self._cache.reset()
        with torch.inference_mode():
            return self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=gen_len,
                max_new_tokens=gen_len,
                do_sample=False,
                past_key_values=self._cache,
                streamer=streamer,
            )

    def inventory(self) -> Inventory:
        return self._inventory()

    def close(self) -> None:
        self._close()


def in_memory(model: Any) -> Inventory:
    """What is held of a model whose parameters are ordinary tensors, or tensors sharded over the ranks."""
    parameters = {name: Stored(numel=p.numel(), home=home_on(p.device)) for name, p in model.named_parameters()}
    local = [getattr(p, "_local_tensor", p) for p in model.parameters()]
    pieces = [(home_on(tensor.device), tensor.untyped_storage().nbytes()) for tensor in local]
    return Inventory(parameters=parameters, held=held(pieces, sum(tensor.nbytes for tensor in local)))


def _contiguous(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The last token of each sequence in one piece, which `linear` multiplies at once.

    Of a view it makes a product for each sequence, unless the weight requires a gradient, and on a CPU a copy of the head
    for each: 3 s of a prefill of OPT-1.3B on two cores.
    """
    return (args[0].contiguous(), *args[1:])


def host_cache(plan: Plan, device: Any) -> Any:
    """The cache of `kv_cache=cpu` for one rank's sequences, or None: keys and values stay on the device."""
    if plan.run.kv_cache.device is not CacheDevice.cpu:
        return None
    from zi_experiments.kv_cache import HostCache  # with transformers' caches, which the launcher does without

    work = plan.run.workload
    sequences = work.batch_size // plan.run.hardware.num_gpus
    return HostCache(plan.architecture.config, device, sequences, work.prompt_len + work.gen_len)
