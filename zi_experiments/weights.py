"""The values of parameters by their names: random ones of the true shape, or a checkpoint's."""

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

from zi_experiments.architecture import local_or_hub, model_class
from zi_experiments.config import Weights, WeightSource


class RandomWeights:
    """Weights that depend on nothing but the seed, the parameter's name, shape and dtype, and the kind of device.

    Matrices are normal with the standard deviation 1/√columns, so that activations stay finite at any depth and width;
    norms are one and biases zero.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def fill(self, name: str, tensor: Any) -> None:
        """Fill a parameter's tensor in place, on its device."""
        import torch

        if tensor.dim() < 2:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
            return
        generator = torch.Generator(tensor.device).manual_seed(crc32(f"{self._seed} {name}".encode()))
        tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)

    def buffers(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


class PretrainedWeights:
    """A checkpoint as plain transformers reads it, one parameter in memory at a time.

    Its files stay where they are and are read in place, but for tensors that transformers stores in another way than the
    checkpoint does (stacked experts, `.bin` files): those are written to a temporary folder until `close`.
    """

    def __init__(self, path: str, config: Any, dtype: Any) -> None:
        self._folder = TemporaryDirectory(prefix="zi-checkpoint-")
        with without_zero3():
            self._model, report = model_class(config).from_pretrained(
                local_or_hub(path),
                config=config,
                dtype=dtype,
                device_map={"": "disk"},
                offload_folder=self._folder.name,
                output_loading_info=True,
            )
        refuse_incomplete(path, self._model, report)

    def fill(self, name: str, tensor: Any) -> None:
        """Fill a parameter's tensor in place, on its device."""
        from accelerate.utils import align_module_device

        owner, _, attribute = name.rpartition(".")
        module = self._model.get_submodule(owner)
        with align_module_device(module, tensor.device):
            tensor.copy_(getattr(module, attribute))

    def buffers(self) -> dict[str, Any]:
        """What the checkpoint holds besides parameters, by name."""
        return dict(self._model.named_buffers())

    def close(self) -> None:
        self._folder.cleanup()


def refuse_incomplete(path: str, model: Any, report: dict[str, Any]) -> None:
    """Raise `ValueError` when transformers reports that a checkpoint lacks weights, which it would make up."""
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    if missing := sorted(set(report["missing_keys"]) - tied):
        raise ValueError(
            f"{path} has no weights for {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''} "
            f"({len(missing)} of the model's parameters): the checkpoint is incomplete or of another model"
        )


def of(weights: Weights, config: Any, dtype: Any) -> RandomWeights | PretrainedWeights:
    """The values of a run's `weights`, for a model of that configuration."""
    if weights.source is WeightSource.random:
        return RandomWeights(weights.seed)
    assert weights.path is not None
    return PretrainedWeights(weights.path, config, dtype)


def empty_model(weights: RandomWeights | PretrainedWeights, config: Any, dtype: Any, device: Any) -> Any:
    """The model as `from_pretrained` builds it, in eval mode: its buffers on a device, its parameters without memory."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with without_zero3(), init_empty_weights(include_buffers=False), no_init_weights():
        model = model_class(config)._from_config(config, dtype=dtype)
    model.tie_weights()
    stored = weights.buffers()
    for name, buffer in model.named_buffers():
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = stored.get(name, buffer).to(device)
    return model.eval()


@contextmanager
def without_zero3() -> Iterator[None]:
    """Let transformers make a plain model although this process has one under ZeRO-3."""
    from transformers.integrations import deepspeed

    zero3 = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero3
