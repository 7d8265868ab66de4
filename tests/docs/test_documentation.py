"""Every command of README, docs and examples, found in their text and carried out as a reader would type it; every link.

As it stands where a processor can. Where the model is too large the smallest of its family takes its place, with the
shortest workload; where there is none so small, or a search would take all of the machine, the plan is made. But for the
README's first two, and before a release, such a model has two layers and a small vocabulary, a text is one page, and W&B,
which takes longer than the run, does not log.
"""

import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass, fields

import cli
import formats
import made_up
import pytest
import torch
from places import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zi_experiments import provenance
from zi_experiments.config.schema import Calibration, Ceilings
from zi_experiments.cost_model.inventory import Held
from zi_experiments.cost_model.prediction import predict
from zi_experiments.measurement.generated import Generated
from zi_experiments.measurement.timing import Pass, Samples
from zi_experiments.measurement.verification import Verification
from zi_experiments.results.metrics import Metrics
from zi_experiments.results.record import Failure, Record, RunInfo, describe_plan

pytestmark = pytest.mark.timeout(1800)  # a sweep is one command
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
RUN = ("python", "-m", "zi_experiments")
SMALLEST = {"opt": "opt-125m", "bloom": "bloom-560m", "qwen3": "qwen3-0.6b"}
LAYERS = {"bloom": "n_layer"}
UNLIMITED = ("workload.batch_size=auto", "experiment=best-throughput")  # they fill the machine that they run on
BIG_MACHINE = ("hardware=h200", "hardware.host_memory_gib=512", "hardware.ceilings.disk_bytes_per_s=5e9")


@dataclass(frozen=True)
class Command:
    page: str  # from the root: two pages are called README.md
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
            yield Command(name_of(page), line, tuple(shlex.split(match[1], comments=True)), match[2].strip())


def quoted(page):
    """The commands that a page names within a sentence."""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        for match in re.finditer(r"`((?:python|make) [^`]*[^`.…])`", line):
            yield Command(name_of(page), number, tuple(shlex.split(match[1])), "")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def once(commands):
    """Those that several pages have where they are first."""
    return list({(command.words, command.shown): command for command in reversed(commands)}.values())[::-1]


def is_of_several(command):
    """Whether a command is typed on several machines."""
    return any(word.startswith("launch.nnodes=") for word in command.words) and "plan_only=true" not in command.words


def launched(page):
    """The settings of the commands of a page that another launcher starts, which is not here."""
    for _, block in blocks(page.read_text()):
        text = "\n".join(block).replace("\\\n", " ")
        for match in re.finditer(r"^(?:torchrun|deepspeed|srun) .* zi_experiments (.*)$", text, re.M):
            yield tuple(shlex.split(match[1]))


TYPED = [command for page in PAGES for command in typed(page)]
QUOTED = [command for page in PAGES for command in quoted(page)]
RUNS = [c for c in TYPED if c.words[:3] == RUN and "plan_only=true" not in c.words and not is_of_several(c)]
TOGETHER = [c for c in TYPED if c.words[:3] == RUN and is_of_several(c)]
PLANS = [c for c in TYPED if c.words[:3] == RUN and "plan_only=true" in c.words]
SCRIPTS = [c for c in TYPED if c.words[0] == "python" and c.words[1].startswith("examples/")]  # test_examples.py's
TOOLS = [c for c in TYPED if c.words[0] == "python" and c.words[:3] != RUN and c not in SCRIPTS]
MAKE = [c for c in TYPED + QUOTED if c.words[0] == "make"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What pages name, and what is there instead."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "nvme").mkdir()
    there = {"/mnt/nvme": str(folder / "nvme"), "/models/my-llama": save_llama(folder / "my-llama")}
    formats.block_fp8(folder / "my-llama-fp8", max_position_embeddings=1024)
    formats.gguf(folder / "made", max_position_embeddings=1024)
    (folder / "made" / "model.gguf").rename(folder / "my-llama.gguf")
    return there | {"examples": str(ROOT / "examples")}


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

    def carry_out(words, fork=True):
        words = [re.sub("|".join(places), lambda found: places[found[0]], word) for word in words]
        if fork:
            return cli.run(words[1:], tmp_path, environment)
        return subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return carry_out


def shortened(overrides, whole=True):
    """The command with the smallest model of its family and the shortest workload, or as a plan."""
    if "--config-dir" in overrides:  # what examples/ has is small
        return [*overrides, "workload=smoke"]
    family, _, size = next((o for o in overrides if o.startswith("model=")), "model=opt-125m")[6:].partition("-")
    if (family not in SMALLEST and size) or any(o.startswith(UNLIMITED) for o in overrides):
        return [*(o for o in overrides if o not in ("-m",)), *BIG_MACHINE, "plan_only=true"]
    kept = [o for o in overrides if not o.startswith(("workload=", "model=opt", "model=bloom", "model=qwen3"))]
    kept = [o.replace("hydra/launcher=slurm", "hydra/launcher=submitit_local") for o in kept]  # there is no queue
    model = [f"model={SMALLEST[family]}"] if family in SMALLEST else []
    tiny = {LAYERS.get(family, "num_hidden_layers"): 2, "vocab_size": 512}
    if whole or any(o.startswith("model=") for o in kept):
        tiny = {}
    return [*kept, *model, *(f"model.architecture.{name}={number}" for name, number in tiny.items()), "workload=smoke"]


def test_commands_are_found():
    assert Command("README.md", 7, (*RUN, "model=opt-175b", "offload=nvme", "quant=int4"), "") in RUNS
    assert len(RUNS) > 12
    assert len(PLANS) > 30
    assert {"run", "test", "bench-gpu"} <= {command.words[1] for command in MAKE}
    assert {"README.md", "docs/recipes.md", "examples/README.md"} <= {command.page for command in RUNS}
    assert len(SCRIPTS) == 2


def a_page(folder):
    """Some of the text whose perplexity is computed otherwise."""
    page = folder / "page.txt"
    page.write_text((ROOT / "zi_experiments" / "data" / "moby-dick.txt").read_text()[:8000])
    return page


@pytest.mark.parametrize("command", once(RUNS), ids=str)
def test_a_run(carry_out, command, every_test, tmp_path):
    brief = [] if every_test or "experiment=quality" not in command.overrides else [f"workload.text={a_page(tmp_path)}"]
    whole = every_test or command in [run for run in RUNS if run.page == "README.md"][:2]
    logged = [] if whole or any(o.startswith("tracking") for o in command.overrides) else ["tracking=none"]
    done = carry_out([*RUN, *shortened(command.overrides, whole), *logged, *brief], fork=not whole)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", once(TOGETHER), ids=str)
def test_a_run_of_several_machines(tmp_path, command):
    """On this one, by two launchers with a processor each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"launch.rdzv_endpoint=127.0.0.1:{probe.getsockname()[1]}"
    typed = [word for word in shortened(command.overrides, whole=False) if not word.startswith("launch.rdzv_endpoint")]
    small = [re.sub(r"^(hardware.num_gpus|workload.batch_size)=.*", r"\1=2", word) for word in typed]
    words = [*RUN[1:], *small, place, "tracking=none"]
    started = [cli.start(words, tmp_path, dict(os.environ)) for _ in range(2)]
    outputs = [process.communicate(timeout=600)[0] for process in started]

    assert [process.returncode for process in started] == [0, 0], outputs
    assert len(list(tmp_path.rglob("result.json"))) == 1


@pytest.mark.parametrize("settings", [each for page in PAGES for each in launched(page)], ids=" ".join)
def test_the_settings_of_what_another_launcher_starts(compose_run, settings):
    assert compose_run(*settings).model.name in settings[0]


@pytest.mark.parametrize("command", once([c for c in PLANS if c.page != "docs/published.md"]), ids=str)
def test_a_plan(carry_out, command):
    """On a machine that is large enough where none is named. Those of docs/published.md are test_published.py's."""
    named = any(word.startswith("hardware=") for word in command.words)
    done = carry_out([*command.words, *(() if named else BIG_MACHINE)])

    assert done.returncode == (1 if command.shown.startswith("refused") else 0), done.stdout + done.stderr
    assert command.shown in done.stdout


def put_what_a_report_needs(words, folder):
    """A run in each folder of outputs/ that a command names, and this project's docs/."""
    (folder / "docs").symlink_to(ROOT / "docs")
    for word in words:
        if word.startswith("outputs") and "--output" not in words[words.index(word) - 1]:
            made_up.write(folder / word, made_up.record())


def is_begun_by_another(command):
    """Another one does all that this does, and more."""
    return any(other.words[: len(command.words)] == command.words != other.words for other in TOOLS)


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=pytest.mark.release if is_begun_by_another(c) else ()) for c in once(TOOLS)],
    ids=str,
)
def test_a_tool(carry_out, command, tmp_path):
    if "zi_experiments.report" in command.words:
        put_what_a_report_needs(command.words, tmp_path)
    # what it measures would become a choice of this checkout
    elsewhere = (
        ("--output", str(tmp_path / "hardware" / "here.yaml")) if "zi_experiments.hardware" in command.words else ()
    )
    done = carry_out([*command.words, *elsewhere])

    # the doctor's code says whether anything is missing here
    assert done.returncode in ((0, 1) if "doctor" in command.words[2] else (0,)), done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", once(MAKE), ids=str)
def test_a_target_of_make(command):
    done = subprocess.run(["make", "--dry-run", *command.words[1:]], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", once([c for c in QUOTED + SCRIPTS if c.words[0] == "python"]), ids=str)
def test_what_a_sentence_names_is_there(command):
    """Those in code blocks are carried out."""
    if command.words[1] == "-m":
        assert command.words[2] in {
            f"zi_experiments{name}" for name in ("", ".hardware", ".doctor", ".report", ".dashboard")
        }
    else:
        assert (ROOT / command.words[1]).is_file()


def test_the_installation_is_what_make_install_does():
    (command,) = [c for c in TYPED if c.words[0] == "pip"]

    assert command.words == ("pip", "install", "-c", "constraints.txt", "-e", ".")
    assert "pip install --no-input --disable-pip-version-check -c constraints.txt -e '.[dev]'" in (
        (ROOT / "Makefile").read_text()
    )


def test_python_in_its_page(carry_out, places):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python-api.md").read_text(), re.S)
    for name, instead in {"facebook/opt-66b": places["/models/my-llama"], "~/offload_dir": places["/mnt/nvme"]}.items():
        assert name in snippet
        snippet = snippet.replace(name, instead)
    check = "logits = model(torch.zeros(1, 4, dtype=torch.long, device=model.device)).logits\nassert logits.isfinite().all()"
    done = carry_out(
        ["python", "-c", f"{snippet}\nwith torch.no_grad():\n    {check.replace(chr(10), chr(10) + '    ')}"]
    )

    assert done.returncode == 0, done.stderr


# --- links and names --------------------------------------------------------------------------------------------------


def prose(page):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$|^    [^\n]*$", "", page.read_text(), flags=re.S | re.M)


def anchors(page):
    """What follows the # in a link to each heading of a page."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def test_the_index_of_docs_has_every_page():
    linked = re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "README.md").read_text())

    assert sorted(linked) == sorted(page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md")


def test_the_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) < 200


def test_every_module_is_in_the_page_on_architecture():
    page = (ROOT / "docs" / "architecture.md").read_text()
    sections = {part.partition("\n")[0]: part for part in page.split("\n### ")}
    package = ROOT / "zi_experiments"
    missing = []
    for path in sorted(package.rglob("*.py")):
        first, _, inside = path.relative_to(package).as_posix().partition("/")
        where, name = (sections[first], inside) if inside else (page, first)
        if path.name != "__init__.py" and f"`{name.removeprefix('stream/')}`" not in where:
            missing.append(f"{first}/{inside}")

    assert missing == []


def test_every_key_of_the_record_is_explained(make_plan, machine):
    run = RunInfo(id="", name="", group=None, started_at="", finished_at=None, command="", git_revision=None)
    one = Pass(ttft_s=1.0, total_s=1.0, step_s=[])
    planned = make_plan("model=opt-13b")
    plan = describe_plan(planned, predict(planned))
    names = {
        *Record(run=run, folder="", choices={}, config={}).to_dict(),
        *(field.name for kind in (Failure, RunInfo, Held, Generated, Metrics, Verification) for field in fields(kind)),
        *Samples(load_s=1.0, warmup=[one], measured=[one]).to_dict(),
        *plan,
        *(key for part in ("placement", "bound", "prediction") for key in plan[part]),
        *(key for use in plan["memory"] for key in use),
        *provenance.describe(machine()),
    }
    text = (ROOT / "docs" / "metrics.md").read_text()

    assert sorted(name for name in names if f"`{name}`" not in text) == []


def test_every_rate_is_explained():
    text = (ROOT / "docs" / "limits.md").read_text()
    names = {field.name for kind in (Ceilings, Calibration) for field in fields(kind)} - {"source"}

    assert sorted(name for name in names if f"`{name}`" not in text) == []
