"""Where DeepSpeed or transformers need another behaviour while a model is loaded, and nowhere else."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from zi_experiments.engines.deepspeed.pinned import pinned_empty
from zi_experiments.plan import ELEMENT_BYTES, Plan
from zi_experiments.progress import Progress


@contextmanager
def _replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute of a class or module by a wrapper of it for a while."""
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def filling(fill: Callable[[str, Any], None]) -> AbstractContextManager[None]:
    """Give each new parameter its value before zero.Init quantizes and partitions it."""
    from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param

    def wrap(original: Any) -> Any:
        def post_init(self: Any, module: Any) -> None:
            for name, parameter in module.named_parameters(recurse=False):
                if not is_zero_param(parameter):
                    parameter.data = parameter.data.to(self.local_device)
                    fill(name, parameter)
            original(self, module)

        return post_init

    return _replaced(Init, "_post_init_method", wrap)


def counting_partitions(progress: Progress) -> AbstractContextManager[None]:
    """Advance the progress by each parameter that reaches its storage."""
    from deepspeed.runtime.zero.partition_parameters import Init

    def wrap(original: Any) -> Any:
        def zero_init_param(self: Any, parameter: Any) -> None:
            stored = parameter.numel() * parameter.element_size()
            original(self, parameter)
            progress.advance(stored)

        return zero_init_param

    return _replaced(Init, "_zero_init_param", wrap)


def counting_loads(plan: Plan, progress: Progress) -> AbstractContextManager[None]:
    """Advance the progress by each parameter that a checkpoint has filled."""
    from torch import nn

    stored = {p.name: plan.stored_numel(p) * ELEMENT_BYTES for p in plan.architecture.parameters}

    def wrap(original: Any) -> Any:
        def load_from_state_dict(self: Any, state_dict: Any, prefix: str, *args: Any) -> None:
            original(self, state_dict, prefix, *args)
            progress.advance(sum(stored.get(prefix + name, 0) for name in self._parameters))

        return load_from_state_dict

    return _replaced(nn.Module, "_load_from_state_dict", wrap)


def keeping_arange() -> AbstractContextManager[None]:
    """Leave the dtype of `torch.arange` alone while a model is built.

    zero.Init makes every new floating-point tensor 16-bit. Rotary embeddings count positions with one, and in 16 bits
    their frequencies are off by up to 0.2 %, which at position 512 can be a radian. Later versions of transformers do the
    same by themselves.
    """
    from deepspeed.runtime.zero import partition_parameters

    arange = partition_parameters._orig_torch_arange

    def wrap(original: Any) -> Any:
        def constructor(fn: Any, target_fp_dtype: Any, target_device: Any) -> Any:
            return original(fn, None if fn is arange else target_fp_dtype, target_device)

        return constructor

    return _replaced(partition_parameters, "zero_wrapper_for_fp_tensor_constructor", wrap)


def quantizing_in(dtype: Any) -> AbstractContextManager[None]:
    """Convert a checkpoint's tensor to the run's dtype, on the run's device, before DeepSpeed quantizes it.

    DeepSpeed quantizes in the checkpoint's dtype and then reads the bits of the scales in the run's: noise.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.inference.quantization.utils import Quantizer

    def wrap(original: Any) -> Any:
        def quantize(self: Any, tensor: Any) -> Any:
            return original(self, tensor.to(get_accelerator().current_device_name(), dtype))

        return quantize

    return _replaced(Quantizer, "quantize", wrap)


def pinning_exactly() -> AbstractContextManager[None]:
    """Pin each partition at its own size.

    torch's allocator copies into a block rounded up to a power of two: OPT-175B in INT4 would take 155 GB, not 98.
    """
    from deepspeed.accelerator import get_accelerator

    def wrap(original: Any) -> Any:
        def pin_memory(self: Any, tensor: Any, align_bytes: int = 1) -> Any:
            return pinned_empty(tensor.numel(), tensor.dtype)

        return pin_memory

    return _replaced(type(get_accelerator()), "pin_memory", wrap)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No report of missing keys: random weights miss them all, and of a checkpoint's the engine makes an error."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
