"""Every command of README and docs, found in their text and carried out as a reader would type it.

As it stands where a processor can. Where the model is too large the smallest of its family takes its place, with the
shortest workload; where there is none so small, or a search would take all of the machine, the plan is made.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytestmark = pytest.mark.timeout(1800)  # a sweep is one command
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("python", "-m", "zi_experiments")
SMALLEST = {"opt": "opt-125m", "bloom": "bloom-560m", "qwen3": "qwen3-0.6b"}
UNLIMITED = ("workload.batch_size=auto", "experiment=best-throughput")  # they fill the machine that they run on
BIG_MACHINE = ("hardware=h200", "hardware.host_memory_gib=512", "hardware.ceilings.disk_bytes_per_s=5e9")


@dataclass(frozen=True)
class Command:
    page: str
    line: int
    words: tuple[str, ...]
    shown: str  # what the page shows below it

    def __str__(self):
        return f"{self.page}:{self.line}"

    @property
    def overrides(self):
        return self.words[3:]


def blocks(text):
    """(number of the first line, lines) of each code block but those in Python: indented by four, or between fences."""
    found, fence, language = [], False, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            fence, language = not fence, line[3:]
            found.append((number + 1, []))
        elif fence:
            if language != "python":
                found[-1][1].append(line)
        elif line.startswith("    "):
            if not found or found[-1][0] + len(found[-1][1]) != number:
                found.append((number, []))
            found[-1][1].append(line[4:])
    return found


def typed(page):
    """The commands in the code blocks of a page; each has the lines up to the next one as what it shows."""
    for first, lines in blocks(page.read_text()):
        text = "\n".join(lines).replace("\\\n", " ")
        for match in re.finditer(
            r"^(?:\$ )?((?:python|make|pip) .*)\n?((?:(?!\$ |python |make |pip ).*\n?)*)", text, re.M
        ):
            line = first + text[: match.start()].count("\n")
            yield Command(page.name, line, tuple(shlex.split(match[1], comments=True)), match[2].strip())


def quoted(page):
    """The commands that a page names within a sentence."""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        for match in re.finditer(r"`((?:python|make) [^`]*[^`.…])`", line):
            yield Command(page.name, number, tuple(shlex.split(match[1])), "")


TYPED = [command for page in PAGES for command in typed(page)]
QUOTED = [command for page in PAGES for command in quoted(page)]
RUNS = [c for c in TYPED if c.words[:3] == RUN and "plan_only=true" not in c.words]
PLANS = [c for c in TYPED if c.words[:3] == RUN and "plan_only=true" in c.words]
TOOLS = [c for c in TYPED if c.words[0] == "python" and c.words[:3] != RUN]
MAKE = [c for c in TYPED + QUOTED if c.words[0] == "make"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What pages name, and what is there instead."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "nvme").mkdir()
    return {"/mnt/nvme": str(folder / "nvme"), "/models/my-llama": save_llama(folder / "my-llama")}


def save_llama(folder):
    """A tiny Llama with a tokenizer that knows the characters."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=1024, **shape)).save_pretrained(folder)
    alphabet = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def carry_out(tmp_path, places):
    """`carry_out(words)` → the finished process, in an empty folder, where nobody is logged in to W&B."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = kept | {"NETRC": str(tmp_path / "netrc"), "COLUMNS": "200"}

    def carry_out(words):
        words = [re.sub("|".join(places), lambda found: places[found[0]], word) for word in words]
        return subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return carry_out


def shortened(overrides):
    """The command with the smallest model of its family and the shortest workload, or as a plan."""
    family, _, size = next((o for o in overrides if o.startswith("model=")), "model=opt-125m")[6:].partition("-")
    if (family not in SMALLEST and size) or any(o.startswith(UNLIMITED) for o in overrides):
        return [*(o for o in overrides if o not in ("-m",)), *BIG_MACHINE, "plan_only=true"]
    kept = [o for o in overrides if not o.startswith(("workload=", "model=opt", "model=bloom", "model=qwen3"))]
    model = [f"model={SMALLEST[family]}"] if family in SMALLEST else []
    return [*kept, *model, "workload=smoke"]


def test_commands_are_found():
    assert Command("README.md", 9, (*RUN, "model=opt-175b", "offload=nvme", "quant=int4"), "") in RUNS
    assert len(RUNS) > 12
    assert len(PLANS) > 30
    assert {"run", "test", "bench-gpu"} <= {command.words[1] for command in MAKE}


@pytest.mark.parametrize("command", RUNS, ids=str)
def test_a_run(carry_out, command):
    done = carry_out([*RUN, *shortened(command.overrides)])

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [c for c in PLANS if c.page != "published.md"], ids=str)
def test_a_plan(carry_out, command):
    """On a machine that is large enough where none is named. Those of docs/published.md are test_published.py's."""
    named = any(word.startswith("hardware=") for word in command.words)
    done = carry_out([*command.words, *(() if named else BIG_MACHINE)])

    assert done.returncode == (1 if command.shown.startswith("refused") else 0), done.stdout + done.stderr
    assert command.shown in done.stdout


@pytest.mark.parametrize("command", TOOLS, ids=str)
def test_a_tool(carry_out, command, tmp_path):
    # what it measures would become a choice of this checkout
    elsewhere = (
        ("--output", str(tmp_path / "hardware" / "here.yaml")) if "zi_experiments.hardware" in command.words else ()
    )
    done = carry_out([*command.words, *elsewhere])

    # the doctor's code says whether anything is missing here
    assert done.returncode in ((0, 1) if "doctor" in command.words[2] else (0,)), done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", MAKE, ids=str)
def test_a_target_of_make(command):
    done = subprocess.run(["make", "--dry-run", *command.words[1:]], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in QUOTED if c.words[0] == "python"], ids=str)
def test_what_a_sentence_names_is_there(command):
    """Those in code blocks are carried out."""
    if command.words[1] == "-m":
        assert command.words[2] in {"zi_experiments", "zi_experiments.hardware", "zi_experiments.doctor"}
    else:
        assert (ROOT / command.words[1]).is_file()


def test_the_installation_is_what_make_install_does():
    (command,) = [c for c in TYPED if c.words[0] == "pip"]

    assert command.words == ("pip", "install", "-c", "constraints.txt", "-e", ".")
    assert "pip install --no-input --disable-pip-version-check -c constraints.txt -e '.[dev]'" in (
        (ROOT / "Makefile").read_text()
    )


def test_python_in_the_readme(carry_out, places):
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.S)
    for name, instead in {"facebook/opt-66b": places["/models/my-llama"], "~/offload_dir": places["/mnt/nvme"]}.items():
        assert name in snippet
        snippet = snippet.replace(name, instead)
    check = "logits = model(torch.zeros(1, 4, dtype=torch.long, device=model.device)).logits\nassert logits.isfinite().all()"
    done = carry_out(
        ["python", "-c", f"{snippet}\nwith torch.no_grad():\n    {check.replace(chr(10), chr(10) + '    ')}"]
    )

    assert done.returncode == 0, done.stderr
