"""Pinned memory for DeepSpeed's own buffers."""

from typing import Any

from zi_experiments.runtime.pinned_memory import register


def register_swap_buffers(model: Any) -> None:
    """Pin DeepSpeed's NVMe buffers: it locks them in memory without CUDA, so copies from them would be pageable."""
    from deepspeed.inference.quantization.utils import get_AsyncPartitionedParameterSwapper

    swapper = get_AsyncPartitionedParameterSwapper(model)
    if swapper is not None and not swapper.use_gds:
        buffers = swapper.buffers
        register(buffers.data_ptr(), buffers.numel() * buffers.element_size())
