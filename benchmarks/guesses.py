"""How often the router of the next layer guesses its experts one layer early: docs/results/guesses.json.

python benchmarks/guesses.py [--layers N] [--output FILE] [MODEL …]

Plain transformers with random weights decode on this machine's first device. A guess is the next layer's router applied to
what this layer's router was given; `guessed` is the share of the next layer's experts that were in it.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout, whether it is installed or not
MODELS = ("qwen3-30b-a3b", "gpt-oss-20b", "mixtral-8x7b")
LAYERS, PROMPT_LEN, GEN_LEN = 12, 128, 16


class Guesses:
    """Hooks on the routers of a model, in the order of its layers."""

    def __init__(self, model: Any) -> None:
        routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
        self.pairs = self.experts = self.right = 0
        self._guess: Any = None  # of the router that is called next
        for router, after in zip(routers, [*routers[1:], None], strict=True):
            # `forward` of the next router is called, not the module: its hook is for its own input
            router.register_forward_hook(lambda _, given, made, after=after: self._called(given[0], made, after))

    def _called(self, given: Any, made: Any, after: Any) -> None:
        if given.shape[:-1].numel() > 1:  # a prompt
            return
        if self._guess is not None:
            actual = _chosen(made)
            self.pairs += 1
            self.experts = len(actual)
            self.right += len(actual & self._guess)
        self._guess = _chosen(after.forward(given)) if after is not None else None


def _chosen(made: Any) -> set[int]:
    """The experts in what a router returns: the only integers."""
    return set(next(part for part in made if not part.is_floating_point()).flatten().tolist())


def measure(name: str, layers: int, overrides: list[str]) -> dict[str, Any]:
    import torch
    from published import compose, described
    from transformers import AutoModelForCausalLM

    run = compose((f"model={name}", f"model.architecture.num_hidden_layers={layers}", *overrides))
    config, device = described(run).config, "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        guesses = Guesses(model)
        prompt = torch.randint(5, config.vocab_size, (1, PROMPT_LEN))
        model.generate(prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=GEN_LEN, max_new_tokens=GEN_LEN)
    share = guesses.right / (guesses.pairs * guesses.experts)
    return {"model": name, "layers": layers, "chosen": guesses.experts, "pairs": guesses.pairs, "guessed": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"of each model, default {LAYERS}")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="added to all models")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "guesses.json")
    asked = parser.parse_args()
    found = []
    for name in asked.models or MODELS:
        found.append(measure(name, asked.layers, asked.override))
        print(found[-1], flush=True)
    import torch
    import transformers

    made_by = {
        "command": shlex.join(["python", "benchmarks/guesses.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    asked.output.write_text(json.dumps({**made_by, "models": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
