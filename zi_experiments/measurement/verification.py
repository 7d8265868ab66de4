"""Verification of the loaded model on a short prompt, against plain transformers with the same weights.

End to end, and layer by layer on the engine's own input to each layer, which shows where the two first differ.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from math import inf, isfinite
from time import perf_counter
from typing import Any

from zi_experiments.cost_model.plan import Plan
from zi_experiments.cost_model.spec import VERIFIED_SEQUENCES, VERIFIED_TOKENS
from zi_experiments.engines.base import Session
from zi_experiments.measurement import prompts
from zi_experiments.measurement import reference as references
from zi_experiments.models.structure import decoder_layers
from zi_experiments.runtime import distributed
from zi_experiments.runtime.progress import Progress
from zi_experiments.system.machines import host_memory_available

# Short, since every pass from disk takes long: a prompt, a decode step, a second one that reads the KV cache written by
# the first, then one forward pass to compare.
SEQUENCES, GEN_LEN = VERIFIED_SEQUENCES, 3
PROMPT_LEN = VERIFIED_TOKENS - GEN_LEN
# An engine that runs the library's own modules on the same device is equal bit for bit. Another kernel, or a bias added
# after the product, costs a few roundings in each layer, and about ten of them end to end.
LAYER_TOLERANCE = {"float16": 0.002, "bfloat16": 0.01}
TOLERANCE = {"float16": 0.01, "bfloat16": 0.05}
# A product on the host that keeps the digits of INT4 weights is compared with weights that are rounded to 16 bits.
UNROUNDED = 3
# Logits of a token decoded alone are rounded differently, on a GPU at times by a percent of the largest logit. A token
# that has nothing to do with the prompt is far off: of 50,000, a handful are within a tenth of the largest logit.
TIE = 0.1
# This rounding may also route a token to another expert.
TOKENS_EQUAL_IF_ROUTED = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The result of a verification, within the tolerances of the dtype."""

    passed: bool
    problem: str | None  # what differs first
    reference: str  # how it was loaded: "AutoModelForCausalLM", or "layer by layer"
    tolerance: float
    layer_tolerance: float
    # the largest ‖engine − reference‖ / ‖reference‖ of a token's logits, end to end; None: not finite
    max_rel_error: float | None
    max_layer_rel_error: float | None  # of the output of one part of the model, given the engine's own input to it
    tokens_equal: bool
    # generated tokens with the reference's largest logit, or a tie; 1 if its own `generate` gives the same tokens
    tokens_equal_fraction: float
    verify_s: float


@dataclass
class _Observed:
    """Inputs and outputs of the engine's decoder layers, and its logits, in one forward pass."""

    tokens: Any = None  # (sequences, prompt and generated tokens)
    logits: Any = None
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


def verify(session: Session, plan: Plan, progress: Progress) -> Verification:
    """Return the verification of a loaded model. Every rank calls this, since each holds a part of the weights.

    The first rank compares. Greedy tokens come from `generate`, so that the KV cache is verified too.
    """
    began = perf_counter()
    progress.begin("verify", plan.architecture.num_layers, "layers")
    longest = plan.architecture.max_positions or PROMPT_LEN + GEN_LEN
    gen_len = min(GEN_LEN, longest // 2)
    ids = prompts.prompts(
        batch_size=SEQUENCES,
        prompt_len=min(PROMPT_LEN, longest - gen_len),
        vocab_size=plan.architecture.config.get_text_config().vocab_size,
        seed=0,
    )
    tokens = session.generate(ids, gen_len, None)
    seen = [_observe(session.model, tokens, way) for way in session.ways()]
    compared = None
    if distributed.rank() == 0:
        with session.parked():
            compared = _compare(plan, seen, ids.shape[1], progress)
    progress.end()
    return Verification(**distributed.from_first_rank(compared), verify_s=perf_counter() - began)


def _observe(model: Any, tokens: Any, way: AbstractContextManager[None]) -> _Observed:
    """Return what a forward pass computes in one of the engine's ways."""
    import torch

    seen = _Observed(tokens=tokens)
    hooks = []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.inputs.append(_hidden_in(args, kwargs))

    def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
        seen.outputs.append(output)

    for layer in decoder_layers(model)[1]:
        hooks += [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    try:
        with torch.inference_mode(), way:
            seen.logits = model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _compare(plan: Plan, passes: list[_Observed], prompt_len: int, progress: Progress) -> dict[str, Any]:
    import torch

    tokens = passes[0].tokens
    reference = references.of(plan, tokens.device, host_memory_available())
    parts: dict[str, float] = {}  # the largest relative error of each part of the model on the engine's own input to it

    def compare(part: str, actual: Any, expected: Any) -> None:
        parts[part] = max(parts.get(part, 0.0), rel_error(actual, expected))

    def layer(index: int, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mine, output = _hidden_in(args, kwargs), forward(*args, **kwargs)
        for seen in passes:
            local, theirs = output, seen.inputs[index]
            if index == 0:
                compare("the embedding", theirs, mine)
            if not torch.equal(mine, theirs):
                given = {name: theirs if value is mine else value for name, value in kwargs.items()}
                local = forward(*(theirs if value is mine else value for value in args), **given)
            compare(f"{reference.layers_name}.{index}", _hidden_out(seen.outputs[index]), _hidden_out(local))
        progress.advance()
        return output

    try:
        logits = reference.run(tokens, layer)
        for seen in passes:
            head = reference.run(tokens, partial(_output_of, seen))
            compare("the final norm and head", seen.logits, head)
        greedy = greedy_fraction(tokens[:, prompt_len:], logits[:, prompt_len - 1 : -1], TIE)
        if greedy < _least_greedy(plan) and _is_generated_by(reference, tokens, prompt_len):
            greedy = 1.0
    finally:
        reference.close()
    # with other roundings, some tokens are routed to other experts, and then all that follows differs
    whole = passes[:1] if plan.architecture.is_routed else passes
    error = max(rel_error(seen.logits, logits) for seen in whole)
    if not logits.isfinite().all():  # the results for such a model say nothing about the engine
        problem: str | None = (
            "the model itself computes values that are not finite, in plain transformers too: some of its weights are not "
            f"finite, or too large for {plan.dtype}: pass weights.path=… of another checkpoint, or weights=random"
        )
    else:
        problem = _problem(plan, passes, parts, error, greedy)
    return {
        "passed": problem is None,
        "problem": problem,
        "reference": reference.kind,
        "tolerance": TOLERANCE[plan.dtype] * _wider(plan),
        "layer_tolerance": LAYER_TOLERANCE[plan.dtype] * _wider(plan),
        "max_rel_error": error if isfinite(error) else None,
        "max_layer_rel_error": max(parts.values()) if all(map(isfinite, parts.values())) else None,
        "tokens_equal": greedy == 1,
        "tokens_equal_fraction": greedy,
    }


def _output_of(seen: _Observed, index: int, *_: Any) -> Any:
    return seen.outputs[index]


def _problem(plan: Plan, passes: list[_Observed], parts: dict[str, float], error: float, greedy: float) -> str | None:
    tolerance, layer_tolerance = (each[plan.dtype] * _wider(plan) for each in (TOLERANCE, LAYER_TOLERANCE))
    for part, part_error in parts.items():
        if not part_error <= layer_tolerance:
            off = _off(part_error, layer_tolerance)
            return f"{part} is the first part of the model that differs from plain transformers: {off}"
    if not error <= tolerance:
        return f"the logits differ from plain transformers: {_off(error, tolerance)}"
    if any((seen.logits[0] == seen.logits[1]).all() for seen in passes):
        return "different prompts give the same logits"
    if greedy < _least_greedy(plan):
        return (
            f"a forward pass computes what plain transformers does, but only {100 * greedy:.0f} % of the tokens that "
            "generate gives are its greedy ones: the KV cache is not right"
        )
    return None


def _wider(plan: Plan) -> int:
    return UNROUNDED if plan.storage.uses_host and plan.run.quant.is_quantized else 1


def _least_greedy(plan: Plan) -> float:
    return TOKENS_EQUAL_IF_ROUTED if plan.architecture.is_routed else 1


def _is_generated_by(reference: references.Reference, tokens: Any, prompt_len: int) -> bool:
    """Return whether plain transformers generates the same tokens.

    In some families they differ from those of its forward pass: RoBERTa, for one, counts positions differently there.
    """
    import torch

    theirs = reference.generate(tokens[:, :prompt_len], tokens.shape[1] - prompt_len)
    return theirs is not None and torch.equal(theirs, tokens)


def _off(error: float, tolerance: float) -> str:
    return f"relative error {error:.2g}, tolerance {tolerance:g}" if isfinite(error) else "not finite"


def rel_error(actual: Any, expected: Any) -> float:
    """Return the largest ‖actual − expected‖ / ‖expected‖ over all tokens; the last dimension is a token's vector.

    It is infinite if any value is not finite.
    """
    expected = expected.float()
    difference = (actual.float() - expected).norm(dim=-1)
    largest = float((difference / expected.norm(dim=-1).clamp_min(1e-12)).max())
    return largest if isfinite(largest) else inf


def greedy_fraction(tokens: Any, logits: Any, tie: float) -> float:
    """Return the share of `tokens` (sequences, length) with the largest of `logits` (sequences, length, vocabulary).

    A logit ties if it is below the largest by at most `tie` times the largest magnitude: rounding decides.
    """
    logits = logits.float()
    largest = logits.amax(-1)
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return float((largest - chosen <= tie * logits.abs().amax(-1)).float().mean())


def _hidden_in(args: Any, kwargs: Any) -> Any:
    """Return the hidden states that a decoder layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def _hidden_out(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
