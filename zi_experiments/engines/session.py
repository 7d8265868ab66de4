"""What the sessions of all engines have in common."""

from collections.abc import Callable
from typing import Any

from zi_experiments.config import CacheDevice
from zi_experiments.plan import Plan


class HFSession:
    """A Hugging Face model that an engine has made ready, on one rank."""

    def __init__(self, model: Any, device: Any, cache: Any = None, close: Callable[[], None] = lambda: None) -> None:
        self.model = model
        self._device = device
        self._cache = cache  # None: one of transformers' own for each pass
        self._close = close

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

    def close(self) -> None:
        self._close()


def host_cache(plan: Plan, device: Any) -> Any:
    """The cache of `kv_cache=cpu` for one rank's sequences, or None: keys and values stay on the device."""
    if plan.run.kv_cache.device is not CacheDevice.cpu:
        return None
    from zi_experiments.kv_cache import HostCache  # with transformers' caches, which the launcher does without

    work = plan.run.workload
    sequences = work.batch_size // plan.run.hardware.num_gpus
    return HostCache(plan.architecture.config, device, sequences, work.prompt_len + work.gen_len)
