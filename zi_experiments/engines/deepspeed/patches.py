"""Changes to the behaviour of DeepSpeed and transformers, only while a model is loaded."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from zi_experiments.runtime.pinned_memory import pinned_empty


@contextmanager
def replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute of a class or module by a wrapper of it, within the context."""
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def partitioning_at_the_end(model_type: Any, prepare: Callable[[str, Any], None]) -> AbstractContextManager[None]:
    """Let zero.Init partition parameters when the whole model exists, and call `prepare(name, parameter)` before each.

    zero.Init partitions the parameters of a module as soon as the module exists. Their names in the model are not known
    then, and a head that will share the embedding's weight is stored separately. Here parameters stay on the meta
    device until the whole model exists. Then one after the other is allocated, prepared and partitioned.
    """
    from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param
    from torch import nn

    # `from_pretrained` makes the method do nothing while the model is built, and ties weights after loading
    tie_weights = model_type.tie_weights

    def wrap(original: Any) -> Any:
        def post_init(self: Any, module: Any) -> None:
            if type(module) is model_type:
                tie_weights(module)
                _partition(self, module, prepare)
            for name, parameter in module.named_parameters(recurse=False):
                if not is_zero_param(parameter):
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
            # the rest that it does to a module does not concern parameters
            parameters, module._parameters = module._parameters, {}
            original(self, module)
            module._parameters = parameters

        return post_init

    return replaced(Init, "_post_init_method", wrap)


def _partition(init: Any, model: Any, prepare: Callable[[str, Any], None]) -> None:
    import torch
    from torch import nn

    owners = defaultdict(list)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners[parameter].append((module, name))
    for full_name, meta in list(model.named_parameters()):
        empty = torch.empty(meta.shape, dtype=init.dtype, device=init.local_device)
        parameter = nn.Parameter(empty, meta.requires_grad)
        for module, name in owners[meta]:
            module._parameters[name] = parameter
        prepare(full_name, parameter)
        init._zero_init_param(parameter)


@contextmanager
def plain_constructors() -> Iterator[None]:
    """Let new tensors have the type that is asked for, while zero.Init makes every floating-point one 16-bit.

    Reading a `.bin` file, or expanding quantized weights, would go wrong.
    """
    from deepspeed.runtime.zero import partition_parameters

    init = partition_parameters.top_level_context
    init._remove_tensor_creation_wrappers()
    try:
        yield
    finally:
        init._add_tensor_creation_wrappers()


def not_quantizing() -> AbstractContextManager[None]:
    """Leave quantization to `quantized.py`: DeepSpeed quantizes plain `nn.Linear` and `nn.Embedding` only."""
    from deepspeed.runtime.zero import partition_parameters

    return replaced(partition_parameters, "WEIGHT_QUANTIZATION_LAYERS", lambda original: ())


def keeping_arange() -> AbstractContextManager[None]:
    """Keep the dtype of `torch.arange` while a model is built.

    zero.Init makes every new floating-point tensor 16-bit. Rotary embeddings count positions with `arange`. In 16 bits
    their frequencies are off by up to 0.2 %, which at position 512 can be a radian. Later versions of transformers
    avoid this themselves.
    """
    from deepspeed.runtime.zero import partition_parameters

    arange = partition_parameters._orig_torch_arange

    def wrap(original: Any) -> Any:
        def constructor(fn: Any, target_fp_dtype: Any, target_device: Any) -> Any:
            return original(fn, None if fn is arange else target_fp_dtype, target_device)

        return constructor

    return replaced(partition_parameters, "zero_wrapper_for_fp_tensor_constructor", wrap)


def pinning_exactly() -> AbstractContextManager[None]:
    """Pin each partition at its exact size.

    torch's allocator rounds each block up to a power of two: OPT-175B in INT4 would take 155 GB, not 98.
    """
    from deepspeed.accelerator import get_accelerator

    def wrap(original: Any) -> Any:
        def pin_memory(self: Any, tensor: Any, align_bytes: int = 1) -> Any:
            return pinned_empty(tensor.numel(), tensor.dtype)

        return pin_memory

    return replaced(type(get_accelerator()), "pin_memory", wrap)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress the report of missing keys: random weights miss all, and for a checkpoint the engine raises an error."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
