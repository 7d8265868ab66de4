"""What a user can get wrong, through the real command line: it is refused by name, and nothing is started or left behind."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import cli as command_line
import pytest
from cli import TINY, Cli

GOOD = TINY.format(layers=2)
HUGE = "9" * 400  # no float is as large
RUNS_CODE = '!!python/object/apply:os.system ["touch pwned"]'


def model(*, without=(), **changed):
    """The YAML of a tiny model with some of its numbers changed, or left out."""
    lines = [line for line in GOOD.splitlines() if line.strip().split(":")[0] not in without]
    for key, value in changed.items():
        lines = [re.sub(rf"^( *{key}:).*", rf"\1 {value}", line) for line in lines]
    return "\n".join(lines) + "\n"


# name: (arguments, what the output says). Flags come first, as Hydra wants them.
SETTINGS = {
    "a wrong choice of a model": (
        ["model=opt-13"],
        r"model=opt-13 is not a choice: pass model=opt-13b; there are .*opt-30b",
    ),
    "a wrong choice of an engine": (["engine=vllm"], r"engine=vllm is not a choice: pass one of .*stream"),
    "a wrong choice in a sweep": (["-m", "engine=stream,vllm", "workload.gen_len=0"], "engine=vllm is not a choice"),
    "no choice of a group": (["model=null"], "(?i)group override"),
    "a group taken away": (["~model"], r"\bmodel\b"),
    "a setting taken away": (["~plan_only"], "plan_only"),
    "an unknown key": (["workload.batchsize=2"], r"workload\.batchsize"),
    "an unknown key, added": (["+workload.batchsize=2"], r"workload\.batchsize is not a setting.*workload\.batch_size"),
    "an unknown group, added": (["+stray.key=1"], "stray is not a setting"),
    "a part of what is null": (
        ["hardware.calibration.layer_s=1"],
        r"hardware\.calibration, which is null: pass hardware=",
    ),
    "a word for a number": (["workload.batch_size=many"], r"workload\.batch_size=many"),
    "a word for a list": (["tracking.tags=alone"], r"tracking\.tags=alone"),
    "a number for an architecture": (["model.architecture=5"], r"model\.architecture=5"),
    "a missing number": (["workload.batch_size=???"], r"workload\.batch_size.*pass workload\.batch_size="),
    "a missing name": (["name=???"], r"\bname\b"),
    "a missing yes or no": (["plan_only=???"], "plan_only"),
    "a missing path of a model": (["model=local"], r"model\.path is required.*pass model\.path="),
    "a missing path of weights": (["weights=pretrained"], r"weights\.path is required.*pass weights\.path="),
    "an empty path on disk": (["offload=nvme", "offload.path="], r"offload\.path='' is not a path"),
    "an interpolation of a missing key": (["workload.seed='${nowhere}'"], r"workload\.seed.*nowhere"),
    "the same in a name": (["name='${nowhere}'"], "nowhere"),
    "the same in what is asked of a sweep": (["tracking.group='${nowhere}'"], r"tracking\.group.*nowhere"),
    "the same in what is asked first": (["plan_only='${nowhere}'"], "nowhere"),
    "an interpolation of a missing variable": (["model.name='${oc.env:ZI_NONE}'"], "ZI_NONE"),
    "an interpolation cycle": (
        ["model.path='${weights.path}'", "weights.path='${model.path}'"],
        r"(model|weights)\.path.*(?i:recursive)",
    ),
    "an interpolation cycle of names": (
        ["name='${model.name}'", "model.name='${name}'"],
        "(?i)recursive interpolation",
    ),
    "an interpolation of another kind": (["offload.aio='${name}'"], r"offload\.aio=tiny-cpu-int4"),
    "half an interpolation": (["name='${'"], r"name='\$\{'"),
    "an unclosed bracket": (["tracking.tags=[a,b"], r"\[a,b"),
    "an unclosed range of a sweep": (["-m", "workload.gen_len=range(0,3"], r"range\(0,3"),
    "no equals sign": (["workload"], "workload"),
    "no key": (["=5"], "=5 has no key: pass GROUP=CHOICE or KEY=VALUE"),
    "a sweep without -m": (["offload=cpu,none"], "offload=cpu,none"),
    "an unknown flag": (["--frobnicate"], "--frobnicate"),
    "no such folder of choices": (["--config-dir=/nowhere"], "/nowhere"),
    "no such configuration": (["--config-name=nope"], "nope"),
    "zero sequences": (["workload.batch_size=0"], r"workload\.batch_size.*pass workload\.batch_size=1"),
    "a negative length": (["workload.gen_len=-1"], r"workload\.gen_len.*pass workload\.gen_len=1"),
    "more sequences than a float holds": ([f"workload.batch_size={HUGE}"], r"workload\.batch_size.*64 bits"),
    "more digits than Python reads": ([f"workload.seed={'9' * 5000}"], "digits"),
    "a seed beyond 64 bits": (["workload.seed=1000000000000000000000000000000"], r"workload\.seed.*64 bits"),
    "memory that is no number": (["hardware.memory_gib=nan"], r"hardware\.memory_gib.*positive"),
    "infinite memory": (["hardware.host_memory_gib=inf"], r"hardware\.host_memory_gib.*finite"),
    "memory beyond floats": ([f"hardware.memory_gib={HUGE}"], r"hardware\.memory_gib"),
    "a ceiling of nothing": (["hardware.ceilings.flops=1e-320"], r"hardware\.ceilings\.flops.*at least 1"),
    "a time limit that is no number": (["launch.timeout_s=nan"], r"launch\.timeout_s"),
    "three ranks for two sequences": (["hardware.num_gpus=3"], r"batch_size=2 cannot be divided among 3 ranks"),
    "a prompt too long": (["workload.prompt_len=4096"], r"exceed the 512 positions.*pass workload\.prompt_len=509"),
    "a group of nothing": (["quant.group_size=0"], r"quant\.group_size=0 is not a group size"),
    "a group that does not divide": (["quant.group_size=50"], r"quant\.group_size=50 does not divide the 768 columns"),
    "groups of 16-bit weights": (["quant=fp16", "quant.group_size=64"], r"quant\.group_size.*pass quant=int4"),
    "no type to compute in": (["hardware.dtypes=[]"], r"hardware\.dtypes=\[\]"),
    "a path for weights in host memory": (["offload.path=/tmp"], r"offload\.path is only used with offload=nvme"),
    "a yes for a share": (["engine=stream", "offload.resident=true"], r"offload\.resident=True is not a share: pass"),
    "a share of another engine's": (["offload.resident=0.5"], r"offload\.resident.*or engine=stream"),
    "a path on disk that is a file": (
        ["offload=nvme", "offload.path=a-file"],
        r"offload\.path=a-file is a file: pass offload\.path=/a/folder",
    ),
    "a path on disk that is not there": (
        ["offload=nvme", "offload.path=AROUND/nowhere"],
        r"offload\.path=.*around/nowhere is no folder: mkdir -p .*around/nowhere",
    ),
    "a plan on a disk that is not there": (
        ["offload=nvme", "offload.path=AROUND/nowhere", "plan_only=true"],
        r"refused offload\.path=.*around/nowhere is no folder: mkdir -p .*around/nowhere",
    ),
    "a model that is a file": (["model=local", "model.path=a-file"], "a-file is a file, and a model is"),
    "a meeting place without a port": (
        ["hardware.num_gpus=2", "launch.nnodes=2", "launch.rdzv_endpoint=node0"],
        r"(?m)\Arefused \S+: launch\.rdzv_endpoint=node0 is no host with a port: pass launch\.rdzv_endpoint=",
    ),
    "weights that are nowhere": (
        ["weights=pretrained", "weights.path=/nowhere/x"],
        r"/nowhere/x does not exist, and a model",
    ),
    "a text for random weights": (["workload.text=a-file"], r"workload\.text=a-file asks for the perplexity of random"),
    "an engine elsewhere": (["engine=stream", "engine.name=../x"], r"engine\.name=\.\./x is not an engine"),
    "an engine that quantizes nothing": (["engine=fsdp"], "engine=fsdp keeps 16-bit weights: pass quant=fp16"),
    "a GPU that is not there": (["hardware=t4"], "hardware=t4 (needs a CUDA GPU|and this machine has)"),
    "two experiments": (["experiment=profiles", "experiment=quality"], r"weights\.path is required"),
    "a name outside of the folder": (
        ["name=../../../../../x", "workload.gen_len=0"],
        r"refused \S*x: workload\.gen_len",
    ),
    "a name that is a path": (["name=AROUND/x", "workload.gen_len=0"], r"/x: workload\.gen_len"),
    "a name too long for a file": ([f"name={'x' * 300}", "workload.gen_len=0"], r"workload\.gen_len"),
    "a name of nothing": (["name=''", "workload.gen_len=0"], r"workload\.gen_len"),
    "a name of two lines": (["name='a\nb'", "workload.gen_len=0"], r"workload\.gen_len"),
    "a name with markup": (["name='[bold]x[/nope]'", "workload.gen_len=0"], r"\[bold\]x\[/nope\]: workload\.gen_len"),
    "an output folder that is a file": (["hydra.run.dir=a-file", "workload.gen_len=0"], "a-file"),
}

# name: (choices/model/bad.yaml, what the output says)
MODELS = {
    "no YAML": ("name: [unclosed\n", r"bad\.yaml.*line 1"),
    "no text": (b"\x00\x01\x02", r"bad\.yaml"),
    "no UTF-8": (b"name: \xff\xfe\n", "utf-8"),
    "a sentence": ("just some text\n", "model.*just some text"),
    "nothing": ("", r"model\.name"),
    "a key twice": (GOOD + "name: again\n", "found duplicate key name"),
    "a stray key": (GOOD + "stray: 1\n", "stray"),
    "code for a number": (model(hidden_size=RUNS_CODE), "python/object/apply"),
    "bytes for a number": (model(hidden_size="!!binary aGVsbG8="), "hidden_size"),
    "no such family": (model(model_type="nonsense"), r"model_type=nonsense is not a model"),
    "no family": (model(without=["model_type"]), r"model\.architecture\.model_type is required"),
    "a list of families": (model(model_type="[opt]"), r"model\.architecture\.model_type is required"),
    "no architecture": ("name: bad\npath: null\narchitecture: null\n", r"model\.path is required"),
    "no word of an architecture": ("name: bad\npath: null\n", r"model\.architecture: no value given"),
    "a negative width": (model(hidden_size=-768), "negative dimension -768"),
    "a word for a width": (model(hidden_size="wide"), "hidden_size.*wide"),
    "a width that is no number": (model(hidden_size=".nan"), "hidden_size"),
}

# flags where Hydra does not expect them: (arguments in this order, what the output says)
IN_ORDER = {
    "-m after overrides": (["workload.gen_len=0,0", "-m"], r"workload\.gen_len must be at least 1"),
    "-m between overrides": (
        ["offload=cpu", "-m", "workload.gen_len=0"],
        r"workload\.gen_len=0: pass flags such as -m before all settings",
    ),
}


@dataclass
class Outcome:
    cli: Cli
    returncode: int
    output: str


def run(folder: Path, arguments: list[str], yaml: str | bytes | None = None, in_order: bool = False) -> Outcome:
    """What one command line does in `folder`/around/work."""
    cli = Cli(folder / "around" / "work")
    (cli.folder / "a-file").write_text("text\n")
    if yaml is not None:
        (cli.folder / "choices" / "model" / "bad.yaml").write_bytes(yaml.encode() if isinstance(yaml, str) else yaml)
    arguments = [argument.replace("AROUND", str(folder / "around")) for argument in arguments]
    typed = [*cli.arguments(), *arguments] if in_order else cli.arguments(*arguments)
    done = command_line.run(["-m", "zi_experiments", *typed], cli.folder, cli.environment())
    return Outcome(cli, done.returncode, done.stdout + done.stderr)


CASES = {
    **{name: ({"arguments": arguments}, says) for name, (arguments, says) in SETTINGS.items()},
    **{
        f"a model of {name}": ({"arguments": ["model=bad"], "yaml": yaml}, says)
        for name, (yaml, says) in MODELS.items()
    },
    **{name: ({"arguments": arguments, "in_order": True}, says) for name, (arguments, says) in IN_ORDER.items()},
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What all of them do."""
    return {name: run(tmp_path_factory.mktemp("case"), **asked) for name, (asked, _) in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_what_is_malformed_is_refused_by_name(outcomes, name):
    outcome = outcomes[name]

    assert outcome.returncode in (1, 2), outcome.output
    assert "Traceback" not in outcome.output
    assert "exception formatting" not in outcome.output
    assert re.search(CASES[name][1], outcome.output), outcome.output


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_started_or_left_behind(outcomes, name):
    work = outcomes[name].cli.folder
    left = {path.name for path in work.rglob("*")}

    assert os.listdir(work.parent) == ["work"]
    assert {path.name for path in work.iterdir()} <= {"a-file", "choices", "disk", "outputs"}
    assert not left & {"logs", "wandb", "ds_config.json", "engine_config.json", "pwned"}
    assert not [name for name in left if name.endswith(".tmp")]


@pytest.mark.parametrize("name", CASES)
def test_each_folder_of_a_run_has_one_result_that_says_refused(outcomes, name):
    results, work = outcomes[name].cli.results(), outcomes[name].cli.folder
    folders = {path.parent for path in work.glob("outputs/**/.hydra")}

    if "plan_only=true" in CASES[name][0]["arguments"]:
        folders = set()  # a plan leaves no record
    assert {result["folder"] for result in results} == folders
    assert [result["status"] for result in results] == ["refused"] * len(folders)
    for result in results:
        message = result["error"]["message"]
        assert message.splitlines() == [message]
        assert message in outcomes[name].output


@pytest.mark.parametrize(
    "arguments",
    [["engine=fsdp"], ["offload=nvme", "offload.path=/nowhere"], ["model=local", "model.path=/nowhere"]],
    ids=str,
)
def test_what_is_wrong_with_any_model_is_said_before_anything_heavy_is_imported(tmp_path, arguments):
    done = Cli(tmp_path).execute(*arguments, PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}

    assert done.stdout.startswith("refused "), done.stdout
    assert "zi_experiments.run" in imported
    assert imported.isdisjoint({"torch", "transformers", "deepspeed"})
