"""How transformers makes each parameter of a model from the tensors of a checkpoint: renamed, merged, split, transposed.

transformers itself is asked, on the meta device: its own loading is watched, and its rules are kept by parameter. A value
is made when it is needed, from the tensors that its rule names, so that one parameter is in memory at a time.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

from zi_experiments.models.causal_lm import model_class, quietly
from zi_experiments.models.stored import Stored

# causal masks that older versions of transformers stored; for some families it reports them as unexpected
_MASKS = re.compile(r"\.attn\.((attention\.)?(masked_)?bias|causal_mask)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a parameter is made: by one of transformers' rules, from tensors of the checkpoint."""

    rule: Any
    layer_name: str  # the parameter's name, as the rule gets it
    sources: tuple[tuple[str, tuple[str, ...]], ...]  # each pattern of the rule, and the names that match it

    def is_by_expert(self, experts: int) -> bool:
        """Return whether the rule makes each expert of a stack from tensors of that expert alone."""
        from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

        operations = getattr(self.rule, "operations", ())
        if not operations:
            return True  # renamed only
        first, *rest = operations
        return (
            isinstance(first, MergeModulelist)
            and first.dim == 0
            and all(isinstance(one, Concatenate | Transpose) for one in rest)
            and all(0 not in (getattr(one, key, None) for key in ("dim", "dim0", "dim1")) for one in rest)
            and all(len(names) == experts for _, names in self.sources)
        )

    def make(self, model: Any, tensors: Mapping[str, Stored], device: Any, index: int | None = None) -> dict[str, Any]:
        """Return the values of the parameters that the rule makes, by name; with `index`, of one expert of a stack."""
        rule = copy(self.rule)
        rule.collected_tensors = defaultdict(list)
        is_list = bool(getattr(rule, "operations", ()))
        for pattern, names in self.sources:
            chosen = names if index is None or not is_list else names[index : index + 1]
            part = None if is_list else index
            rule.collected_tensors[pattern] = [tensors[name].read(device, part) for name in chosen]
        made = rule.convert(self.layer_name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """What transformers makes of a checkpoint."""

    model: Any  # on the meta device
    report: dict[str, Any]  # of its loading: missing, unexpected and mismatched keys
    ignored: frozenset[str]  # tensors that it leaves out on purpose
    recipes: dict[str, Recipe]  # by the parameter's or buffer's name


def resolve(config: Any, tensors: Mapping[str, Stored], dtype: Any, rules: list[Any] | None = None) -> Resolved:
    """Return how a model of `config` is made from a checkpoint's tensors; `rules` replace those of the model's family."""
    plain = model_class(config)
    ignored: set[str] = set()

    def adjust(self: Any, loading_info: Any) -> None:
        before = set(loading_info.unexpected_keys)
        plain._adjust_missing_and_unexpected_keys(self, loading_info)
        loading_info.unexpected_keys -= {name for name in loading_info.unexpected_keys if _MASKS.search(name)}
        ignored.update(before - loading_info.unexpected_keys)

    # keeps the name, by which transformers finds its conversions
    observed: Any = type(
        plain.__name__, (plain,), {"_adjust_missing_and_unexpected_keys": adjust, "__module__": plain.__module__}
    )
    with without_zero3(), quietly(), _following(rules), _recorded() as recipes:
        model, report = observed.from_pretrained(
            None,
            config=config,
            state_dict={name: stored.without_data() for name, stored in tensors.items()},
            dtype=dtype,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,  # the report lists them
            output_loading_info=True,
        )
    return Resolved(model=model, report=report, ignored=frozenset(ignored), recipes=recipes)


@contextmanager
def _recorded() -> Iterator[dict[str, Recipe]]:
    """Yield what becomes the recipes of a model that transformers loads meanwhile."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform

    recipes: dict[str, Recipe] = {}
    sources: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    add_tensor = WeightTransform.add_tensor

    def add(self: Any, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        sources[id(self)][source_pattern].append(source_key)
        add_tensor(self, target_key, source_key, source_pattern, future)

    def recording(convert: Any) -> Any:
        def record(self: Any, layer_name: str, *args: Any, **kwargs: Any) -> Any:
            made = convert(self, layer_name, *args, **kwargs)
            named = tuple((pattern, tuple(names)) for pattern, names in sources[id(self)].items())
            recipe = Recipe(rule=self, layer_name=layer_name, sources=named)
            recipes.update(dict.fromkeys(made, recipe))
            return made

        return record

    kinds = (WeightRenaming, WeightConverter)
    originals = [kind.convert for kind in kinds]
    WeightTransform.add_tensor = add
    for kind, original in zip(kinds, originals, strict=True):
        kind.convert = recording(original)
    try:
        yield recipes
    finally:
        WeightTransform.add_tensor = add_tensor
        for kind, original in zip(kinds, originals, strict=True):
            kind.convert = original


@contextmanager
def _following(rules: list[Any] | None) -> Iterator[None]:
    """Let transformers load by other rules than those of the model's family."""
    from transformers import modeling_utils

    original = modeling_utils.get_model_conversion_mapping
    if rules is not None:
        modeling_utils.get_model_conversion_mapping = lambda *args, **kwargs: rules
    try:
        yield
    finally:
        modeling_utils.get_model_conversion_mapping = original


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
