"""Throughput experiments for models larger than the GPU, around DeepSpeed ZeRO-Inference."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zi_experiments.api import get_ds_model

__all__ = ["get_ds_model"]


def __getattr__(name: str) -> Any:
    if name == "get_ds_model":
        from zi_experiments.api import get_ds_model  # imports torch, which the command line does without at first

        return get_ds_model
    raise AttributeError(f"module {__name__} has no attribute {name}")
