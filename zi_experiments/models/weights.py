"""Values of parameters by name: random, or from a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

from zi_experiments.config.schema import ConfigError, Weights, WeightSource
from zi_experiments.models.architecture import local_or_hub, model_class, reason


class RandomWeights:
    """Random weights that depend only on the seed, the parameter's name, shape and dtype, and the kind of device.

    Matrices are normal with standard deviation 1/√columns, so that activations stay finite at any depth and width;
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
    """The weights of a checkpoint as plain transformers loads them, with one parameter in memory at a time.

    Its files are read in place. Only tensors that transformers stores differently from the checkpoint (stacked experts,
    `.bin` files) are written to a temporary folder, until `close`.
    """

    def __init__(self, path: str, config: Any, dtype: Any) -> None:
        self._folder = TemporaryDirectory(prefix="zi-checkpoint-")
        with without_zero3():
            self._model = load_model(path, config, dtype, device_map={"": "disk"}, offload_folder=self._folder.name)
        tied = self._model.all_tied_weights_keys
        # files may store a tied parameter under either of its names
        self._tied = tied | {source: target for target, source in tied.items()}

    def fill(self, name: str, tensor: Any) -> None:
        """Fill a parameter's tensor in place, on its device."""
        try:
            self._fill(name, tensor)
        except KeyError:
            self._fill(self._tied[name], tensor)

    def _fill(self, name: str, tensor: Any) -> None:
        from accelerate.utils import align_module_device

        owner, _, attribute = name.rpartition(".")
        module = self._model.get_submodule(owner)
        with align_module_device(module, tensor.device):
            tensor.copy_(getattr(module, attribute))

    def buffers(self) -> dict[str, Any]:
        """Return the checkpoint's buffers by name."""
        return dict(self._model.named_buffers())

    def close(self) -> None:
        self._folder.cleanup()


def load_model(path: str, config: Any, dtype: Any, **how: Any) -> Any:
    """Return the model of `config` with the weights of a checkpoint, as `from_pretrained(**how)` loads it.

    Raises `ConfigError` when it cannot be downloaded, or lacks weights, which transformers would initialise.
    """
    try:
        model, report = model_class(config).from_pretrained(
            local_or_hub(path), config=config, dtype=dtype, output_loading_info=True, **how
        )
    except OSError as error:
        if Path(local_or_hub(path)).is_dir():
            raise
        raise ConfigError(
            f"{path} cannot be downloaded from the hub ({reason(error)}): pass weights.path=… of a folder, or weights=random"
        ) from error
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    if missing := sorted(set(report["missing_keys"]) - tied):
        raise ConfigError(
            f"{path} has no weights for {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''} ({len(missing)} of the "
            "model's parameters): pass weights.path=… of a checkpoint that has them, or weights=random"
        )
    return model


def of(weights: Weights, config: Any, dtype: Any) -> RandomWeights | PretrainedWeights:
    """Return the source of a run's weights, for a model of that configuration."""
    if weights.source is WeightSource.random:
        return RandomWeights(weights.seed)
    assert weights.path is not None
    return PretrainedWeights(weights.path, config, dtype)


def empty_model(weights: RandomWeights | PretrainedWeights, config: Any, dtype: Any, device: Any) -> Any:
    """Return the model as `from_pretrained` builds it, in eval mode: buffers on `device`, parameters on meta."""
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
    """Let transformers build a plain model even while this process has one under ZeRO-3."""
    from transformers.integrations import deepspeed

    zero3 = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero3
