"""What a plan needs to know about a model."""

from dataclasses import dataclass, field
from math import prod
from typing import Any

from zi_experiments.models.packing import Packing

ANOTHER_MODEL = "pass model=opt-125m, or model=local model.path=… of another"  # ends messages about one that cannot run


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter tensor of the model; tied parameters appear once."""

    name: str
    shape: tuple[int, ...]
    quantizable: bool
    layer: int | None  # index of its decoder layer; None outside of the layers
    # name of its module, if that computes each token with the experts that a router selects for it, one of which is
    # `tensor[i]`, through transformers' interface for experts; None for other parameters
    experts: str | None = None
    native: Packing | None = None  # how checkpoints store it, if they store it quantized
    is_linear: bool = (
        False  # the weight of a linear layer, as torch has it: (outputs, inputs); or a stack of such for experts
    )

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_experts(self) -> bool:
        """True if it is a stack of expert matrices, of which a router selects some for each token."""
        return self.quantizable and len(self.shape) == 3


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayer:
    """Size of one attention layer's KV cache."""

    elements_per_token: int  # of keys and values together
    max_tokens: int | None  # of a sliding window; None: all tokens are kept

    def elements(self, tokens: int) -> int:
        """Return the cached elements of one sequence of so many tokens."""
        return self.elements_per_token * (tokens if self.max_tokens is None else min(tokens, self.max_tokens))


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredAs:
    """How the weights are stored in a checkpoint."""

    format: str  # the quantization method, or the type of most weights
    bits_per_parameter: float | None  # scales included; None: its files are not here yet
    is_quantized: bool
    is_expanded_by_transformers: bool  # False: quantized, and plain transformers cannot expand it


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Everything that a plan needs to know about a model."""

    config: Any = field(repr=False)  # the transformers configuration
    model_type: str
    dtype: str | None  # the type in the configuration
    hidden_size: int
    num_layers: int
    max_positions: int | None  # None: no limit
    layer_classes: tuple[str, ...]  # dotted paths of the decoder layers' classes: hybrids have several
    is_text_part: bool  # of a multimodal checkpoint, whose other towers are dropped
    notes: tuple[str, ...]  # deviations from the configuration
    parameters: tuple[Parameter, ...] = field(repr=False)
    kv_layers: tuple[KVLayer, ...] = field(repr=False)
    has_own_cache: bool  # its own class for the KV cache or for states; it accepts no other cache
    # tensors in the checkpoint that the model leaves out on purpose
    ignored_tensors: tuple[str, ...] = field(default=(), repr=False)
    stored: StoredAs | None = None  # in the checkpoint; None: random weights, or nothing is known before it is loaded

    @property
    def is_routed(self) -> bool:
        """True if the model has experts: each token uses only those that a router selects."""
        return any(parameter.is_experts for parameter in self.parameters)

    @property
    def num_parameters(self) -> int:
        """All parameters, tied ones counted once."""
        return sum(parameter.numel for parameter in self.parameters)

    def kv_elements(self, tokens: int) -> int:
        """Return the KV cache elements of one sequence of so many tokens, over all layers."""
        return sum(layer.elements(tokens) for layer in self.kv_layers)
