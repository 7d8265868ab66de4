"""Values of parameters by name: random, or from a checkpoint."""

from typing import Any
from zlib import crc32

from zi_experiments.config.schema import ConfigError, Weights, WeightSource
from zi_experiments.models import checkpoint, hub, native, native_files, opening
from zi_experiments.models.causal_lm import model_class
from zi_experiments.models.checkpoint import Checkpoint
from zi_experiments.models.conversion import Recipe, resolve, without_zero3
from zi_experiments.models.native import Packed
from zi_experiments.models.packing import Packing
from zi_experiments.quoting import reason


class RandomWeights:
    """Random weights that depend only on the seed, the parameter's name, shape and dtype, and the kind of device.

    Matrices are normal with standard deviation 1/√columns, so that activations stay finite at any depth and width;
    norms are one and biases zero.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def fill(self, name: str, tensor: Any) -> None:
        """Fill a parameter's tensor in place, on its device."""
        if tensor.dim() < 2:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
            return
        tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=self._generator(name, tensor.device))

    def packed(self, name: str, shape: tuple[int, ...], packing: Packing, dtype: Any, device: Any) -> Packed:
        """Return codes and scales of a parameter of this shape, for runs in that 16-bit type, on a device."""
        return native.random(packing, shape, dtype, self._generator(name, device))

    def _generator(self, name: str, device: Any) -> Any:
        import torch

        return torch.Generator(device).manual_seed(crc32(f"{self._seed} {name}".encode()))

    def buffers(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


class PretrainedWeights:
    """The weights of a checkpoint as plain transformers loads them, with one parameter in memory at a time.

    Its files are read in place, and nothing is written. Weights that are quantized already are expanded to `dtype`; of
    stacked experts one at a time.
    """

    def __init__(self, path: str, config: Any, dtype: Any) -> None:
        opened = opening.open_files(_present(path, config), config, dtype)
        self._tensors = opened.tensors
        resolved = resolve(config, opened.tensors, dtype)
        self._model, self._recipes = resolved.model, resolved.recipes
        tied = self._model.all_tied_weights_keys
        if missing := sorted(set(resolved.report["missing_keys"]) - set(tied)):
            raise ConfigError(
                f"{path} has no weights for {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''} ({len(missing)} of "
                "the model's parameters): pass weights.path=… of a checkpoint that has them, or weights=random"
            )
        # files may store a tied parameter under either of its names
        self._tied = tied | {source: target for target, source in tied.items()}

    def fill(self, name: str, tensor: Any) -> None:
        """Fill a parameter's tensor in place, on its device."""
        name = self._stored_name(name)
        recipe = self._recipes[name]
        if tensor.dim() == 3 and recipe.is_by_expert(len(tensor)):
            for index in range(len(tensor)):
                tensor[index : index + 1].copy_(self._made(recipe, tensor.device, index)[name])
        else:
            tensor.copy_(self._made(recipe, tensor.device)[name])

    def packed(self, name: str, shape: tuple[int, ...], packing: Packing, dtype: Any, device: Any) -> Packed:
        """Return codes and scales of a parameter of this shape as the files have them, on a device.

        Raises `ConfigError` when their scales are of another 16-bit type than the run computes in, or when the files were
        downloaded after the plan, and have another format than their `config.json` says.
        """
        recipe = self._recipes[self._stored_name(name)]
        if native_files.packing_of(packing, shape, recipe, self._tensors) != packing:
            raise ConfigError(
                f"the files, which are here only now, have {name} in another format than their config.json says: "
                "type the command again, or pass quant=fp16"
            )
        found = native_files.read(packing, shape, recipe, self._tensors, device)
        if packing.format.numbers == (2,) and found.scales.dtype != dtype:
            stored = str(found.scales.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{name} has scales in {stored}, which quant=native multiplies with: pass dtype={stored}, or quant=fp16"
            )
        return found

    def _stored_name(self, name: str) -> str:
        return name if name in self._recipes else self._tied[name]

    def _made(self, recipe: Recipe, device: Any, index: int | None = None) -> dict[str, Any]:
        return recipe.make(self._model, self._tensors, device, index)

    def buffers(self) -> dict[str, Any]:
        """Return the checkpoint's buffers by name."""
        held = [(name, buffer) for name, buffer in self._model.named_buffers() if name in self._recipes]
        return {name: self._made(self._recipes[name], "cpu")[name].to(buffer.dtype) for name, buffer in held}

    def close(self) -> None:
        self._tensors = {}


def _present(path: str, config: Any) -> Checkpoint:
    """Return the files of a checkpoint, those on the hub downloaded. Raises `ConfigError` if they cannot be."""
    if (found := checkpoint.find(path)) is not None:
        return found
    try:
        folder = hub.download(path, getattr(config, "_commit_hash", None))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be downloaded from the hub ({reason(error)}): pass weights.path=… of a folder, or weights=random"
        ) from error
    found = checkpoint.find(str(folder))
    assert found is not None
    return found


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
    model.initialize_weights()  # computes buffers in 32 bits, as after a checkpoint is loaded; parameters have no values
    fill_buffers(model, weights, device)
    return model.eval()


def fill_buffers(model: Any, weights: RandomWeights | PretrainedWeights, device: Any = None) -> None:
    """Give a model the buffers of its checkpoint, and move all of them to `device`; None: to where they are."""
    stored = weights.buffers()
    for name, buffer in list(model.named_buffers()):
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = stored.get(name, buffer).to(device or buffer.device)
