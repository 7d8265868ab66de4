"""A checkpoint that brings the code of its model and its tokenizer. Each file leaves a mark when it is run."""

import json
from pathlib import Path

import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig
Path({mark!r}).open("a").write("configuration ")

class BroughtConfig(LlamaConfig):
    model_type = "brought"
"""
MODELING = """
from pathlib import Path
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from .configuration_brought import BroughtConfig
Path({mark!r}).open("a").write("modeling ")

class BroughtLayer(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return -super().forward(hidden_states, **kwargs)

class BroughtForCausalLM(LlamaForCausalLM):
    config_class = BroughtConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers = nn.ModuleList(BroughtLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return super().prepare_inputs_for_generation(*args, **kwargs)
"""
TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({mark!r}).open("a").write("tokenizer ")

class BroughtTokenizer(PreTrainedTokenizerFast):
    pass
"""


def save(folder: Path, mark: Path, *, known: bool = False) -> None:
    """Write a checkpoint to `folder` whose code writes to `mark`; of a `known` model it brings the tokenizer's alone."""
    tiny.model("llama").to(torch.bfloat16).save_pretrained(folder)
    words = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="BroughtTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_brought.BroughtTokenizer"]},
    )
    code = {"tokenization": TOKENIZER}
    if not known:
        code |= {"configuration": CONFIGURATION, "modeling": MODELING}
        names = {
            "AutoConfig": "configuration_brought.BroughtConfig",
            "AutoModelForCausalLM": "modeling_brought.BroughtForCausalLM",
        }
        change(folder / "config.json", model_type="brought", architectures=["BroughtForCausalLM"], auto_map=names)
    for kind, text in code.items():
        (folder / f"{kind}_brought.py").write_text(text.format(mark=str(mark)))


def change(file: Path, **values) -> None:
    """Change some keys of a file of JSON."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
