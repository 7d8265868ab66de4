"""Random weights of the true shape, made one parameter at a time."""

from typing import Any


class RandomWeights:
    """Fills parameters in the order in which they are made, from one seed.

    Matrices are normal with the standard deviation 1/√fan_in, so that activations stay finite at any depth and width;
    norms are one and biases zero.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[Any, Any] = {}

    def fill(self, name: str, parameter: Any) -> None:
        """Fill one parameter in place, on its device."""
        import torch

        data = parameter.data
        if data.dim() < 2:
            data.fill_(1.0 if name == "weight" else 0.0)
            return
        if data.device not in self._generators:
            self._generators[data.device] = torch.Generator(data.device).manual_seed(self._seed)
        data.normal_(0.0, data.shape[-1] ** -0.5, generator=self._generators[data.device])
