import dataclasses
import os
import re
import shlex
import subprocess
import sys
from itertools import product
from math import inf, nan
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

import zi_experiments
from zi_experiments.config import schema
from zi_experiments.config.composition import to_run
from zi_experiments.config.schema import ConfigError, OffloadDevice, Run, TrackingMode, Verify, conf_dir
from zi_experiments.results import metrics

YAMLS = sorted(
    (path for path in conf_dir().glob("*/*.yaml") if path.parent.name != "hydra"),
    key=lambda path: (path.parent.name, path.stem),
)
GROUPS = sorted({path.parent.name for path in YAMLS})
CHOICES = [(path.parent.name, path.stem) for path in YAMLS]
SCHEMAS = [kind for kind in vars(schema).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]


def schema_nodes(node=Run, prefix=""):
    """The dotted prefix of every node of the schema: "" for the root, "offload.aio." for the deepest."""
    yield prefix
    for field in dataclasses.fields(node):
        if dataclasses.is_dataclass(field.type):
            yield from schema_nodes(field.type, f"{prefix}{field.name}.")


def cli(*arguments, cwd, python_options=()):
    command = [sys.executable, *python_options, "-m", "zi_experiments", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_to_a_valid_run(compose, group, choice):
    needed = ["model.path=/models/tiny"] if choice == "local" else []

    run = to_run(compose(f"{group}={choice}", *needed))

    assert isinstance(run, Run)
    node = getattr(run, group, None)
    if hasattr(node, "name"):
        assert node.name == ("tiny" if choice == "local" else choice)


def sweep(experiment):
    """Every combination of what an experiment sweeps, as overrides; one empty one when it sweeps nothing."""
    file = OmegaConf.load(conf_dir() / "experiment" / f"{experiment}.yaml")
    swept = OmegaConf.select(file, "hydra.sweeper.params") or {}
    return list(product(*([f"{key}={value}" for value in choices(values)] for key, values in swept.items())))


def choices(values):
    """What Hydra makes of a list, or of a range."""
    counted = re.fullmatch(r"range\((\d+)\)", values)
    return range(int(counted[1])) if counted else values.split(",")


EXPERIMENTS = [(name, cell) for group, name in CHOICES if group == "experiment" for cell in sweep(name)]


@pytest.mark.parametrize(("experiment", "cell"), EXPERIMENTS, ids=str)
def test_every_cell_of_an_experiment_is_a_valid_run(compose_run, experiment, cell):
    assert compose_run(f"experiment={experiment}", *cell).workload.repeats >= 1


@pytest.mark.parametrize("experiment", [name for group, name in CHOICES if group == "experiment"])
def test_an_experiment_asks_a_question_that_figures_answer_and_sweeps_by_itself(compose_run, experiment):
    file = OmegaConf.load(conf_dir() / "experiment" / f"{experiment}.yaml")

    metrics.check(compose_run(f"experiment={experiment}", *sweep(experiment)[0]))
    assert file.question.text.endswith("?")
    assert (OmegaConf.select(file, "hydra.sweeper.params") is None) == (OmegaConf.select(file, "hydra.mode") is None)


@pytest.mark.parametrize("key", ["question.figures=[decode_tok_per_s,kl_divergance]", "published.figure=kl_divergance"])
def test_an_answer_that_is_no_figure_is_refused(compose_run, key):
    run = compose_run("experiment=engines", key)

    with pytest.raises(ConfigError, match=r": kl_divergance is not a figure: pass kl_divergence$"):
        metrics.check(run)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"value": "fast"}, r"^published.rows\[0\].value is missing or of another type: write value: 7.3$"),
        ({"batch": 0}, "batch=0 is not a number of sequences: write batch: 8$"),
        ({"system": "Mine"}, "system=Mine is not in published.systems: write it there"),
        ({"run": "opt-13b"}, "opt-13b is not GROUP=CHOICE or KEY=VALUE: write"),
    ],
    ids=str,
)
def test_a_published_row_that_is_not_whole_is_refused(compose_run, compose, row, said):
    cfg = compose("published=flexgen-2023")
    OmegaConf.update(cfg, "published.rows", [{"system": "FlexGen", "value": 1, "batch": 2, "run": ""} | row])

    with pytest.raises(ConfigError, match=said):
        to_run(cfg)


@pytest.mark.parametrize(
    "overrides",
    [
        ("workload.batch_size=4", "model=opt-30b", "offload=nvme", "offload.aio.block_size=4096"),
        ("experiment=quality", "weights.path='/a b'", "++workload.gen_len=2", "name=${model.name}"),
        ("model=bloom-3b", "+model.architecture.x={a: 1}", "tracking.tags=[a,b]", "~model.architecture.model_type"),
        ("quant=int8", "quant.group_size=128", "quant=fp16", "quant.group_size=null"),
    ],
    ids=str,
)
def test_what_tests_compose_is_what_hydra_does(compose, compose_anew, overrides):
    assert compose(*overrides) == compose_anew(*overrides)


def test_the_promised_groups_exist():
    groups = {"model", "offload", "quant", "kv_cache", "hardware", "engine", "weights", "workload", "tracking"}

    assert groups <= set(GROUPS)


def test_the_default_run(compose_run):
    run = compose_run()

    assert run.name == "opt-125m-cpu-int4"
    assert run.engine.name == "deepspeed"
    assert run.hardware.name == "auto"


def test_nothing_is_left_without_a_value(compose):
    assert OmegaConf.missing_keys(compose()) == set()


@pytest.mark.parametrize("kind", SCHEMAS, ids=lambda kind: kind.__name__)
def test_values_live_in_yaml_only(kind):
    for field in dataclasses.fields(kind):
        assert field.default is dataclasses.MISSING, field.name
        assert field.default_factory is dataclasses.MISSING, field.name


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [
        ("workload.batch_size", "6", 6),
        ("workload.batch_size", "auto", "auto"),
        ("workload.prompt_len", "16", 16),
        ("workload.gen_len", "2", 2),
        ("workload.warmup", "0", 0),
        ("workload.repeats", "5", 5),
        ("workload.seed", "7", 7),
        ("offload.device", "cpu", OffloadDevice.cpu),
        ("offload.pin_memory", "false", False),
        ("offload.resident", "0.25", 0.25),
        ("offload.resident", "1", 1),
        ("offload.resident", "auto", "auto"),
        ("offload.compute", "0.5", 0.5),
        ("offload.compute", "gpu", "gpu"),
        ("offload.compute", "auto", "auto"),
        ("workload.micro_batches", "3", 3),
        ("quant.bits", "8", 8),
        ("quant.group_size", "32", 32),
        ("quant.group_dim", "0", 0),
        ("model.path", "/models/mine", "/models/mine"),
        ("engine.profile", "reference", schema.Profile.reference),
        ("hardware.num_gpus", "2", 2),
        ("hardware.memory_gib", "24", 24.0),
        ("search.rank", "2", 2),
        ("search.rank", "null", None),
        ("tracking.mode", "offline", TrackingMode.offline),
        ("verify", "off", Verify.off),
        ("plan_only", "true", True),
    ],
)
def test_promised_names_reach_the_run(compose_run, key, typed, value):
    streamed = ["engine=stream"] if key in ("offload.resident", "offload.compute", "workload.micro_batches") else []
    reached = compose_run(f"{key}={typed}", *streamed)
    for name in key.split("."):
        reached = getattr(reached, name)

    assert reached == value


@pytest.mark.parametrize(("choice", "key"), [("offload=nvme", "offload.path"), ("weights=pretrained", "weights.path")])
def test_promised_paths_reach_the_run(compose_run, choice, key):
    group, name = key.split(".")

    assert getattr(getattr(compose_run(choice, f"{key}=/mnt/x"), group), name) == "/mnt/x"


RULES = [
    # overrides that cannot be, the key that the message names, what it says to type
    (["workload.batch_size=0"], "workload.batch_size", "workload.batch_size=1"),
    (["workload.batch_size=many"], "workload.batch_size", "workload.batch_size=8"),
    (["workload.batch_size=Auto"], "workload.batch_size", "workload.batch_size=8"),
    (["workload.batch_size=2.5"], "workload.batch_size", "workload.batch_size=8"),
    (["workload.batch_size=true"], "workload.batch_size", "workload.batch_size=8"),
    (["workload.batch_size=null"], "workload.batch_size", "workload.batch_size=8"),
    (["workload.batch_size=[1,2]"], "workload.batch_size", "workload.batch_size=8"),
    (["workload.batch_size=auto", "workload.prompt_len=0"], "workload.prompt_len", "workload.prompt_len=1"),
    (
        ["workload.batch_size=auto", "engine=stream", "workload.micro_batches=0"],
        "workload.micro_batches",
        "workload.micro_batches=1",
    ),
    (["workload.batch_size=auto", "hardware.num_gpus=0"], "hardware.num_gpus", "hardware.num_gpus=1"),
    (["search.rank=-1"], "search.rank", "search.rank=0"),
    (["workload.prompt_len=0"], "workload.prompt_len", "workload.prompt_len=1"),
    (["workload.gen_len=-3"], "workload.gen_len", "workload.gen_len=1"),
    (["workload.warmup=-1"], "workload.warmup", "workload.warmup=0"),
    (["workload.repeats=0"], "workload.repeats", "workload.repeats=1"),
    (["hardware.num_gpus=0"], "hardware.num_gpus", "hardware.num_gpus=1"),
    (["launch.nnodes=0"], "launch.nnodes", "launch.nnodes=1"),
    (
        ["launch.nnodes=2", "hardware.num_gpus=3", "workload.batch_size=12", "plan_only=true"],
        "num_gpus",
        "hardware.num_gpus=4",
    ),
    (["launch.nnodes=2", "hardware.num_gpus=2"], "launch.nnodes", "launch.rdzv_endpoint=node0:29500"),
    (["launch.rdzv_endpoint=node0"], "launch.rdzv_endpoint", "launch.rdzv_endpoint=node0:29500"),
    (["launch.rdzv_endpoint=node0:99999"], "launch.rdzv_endpoint", "launch.rdzv_endpoint=node0:29500"),
    (["hardware.price_per_hour=0"], "hardware.price_per_hour", "hardware.price_per_hour=null"),
    (["hardware.peer_bytes_per_s=0"], "hardware.peer_bytes_per_s", "hardware.peer_bytes_per_s=null"),
    (["hardware.price_per_hour=inf"], "hardware.price_per_hour", "hardware.price_per_hour=null"),
    (["hardware.num_gpus=2", "workload.batch_size=5"], "workload.batch_size", "workload.batch_size=4"),
    (
        ["engine=stream", "hardware.num_gpus=2", "workload.batch_size=5", "workload.micro_batches=2"],
        "workload.batch_size",
        "workload.batch_size=4",
    ),
    (["hardware.num_gpus=4", "workload.batch_size=1"], "workload.batch_size", "workload.batch_size=4"),
    (["quant=fp16", "quant.group_size=64"], "quant.group_size", "quant=int4"),
    (["quant=fp16", "quant.group_dim=1"], "quant.group_dim", "quant=int4"),
    (["quant.group_size=null"], "quant.group_size", "quant.group_size=64"),
    (["quant.group_size=1"], "quant.group_size", "quant.group_size=64"),
    (["quant.group_dim=null"], "quant.group_dim", "quant.group_dim=1"),
    (["quant.group_dim=2"], "quant.group_dim", "quant.group_dim=1"),
    (["offload=cpu", "offload.path=/mnt/x"], "offload.path", "offload=nvme"),
    (["offload=cpu", "engine=stream", "offload.path=[/a,/b]"], "offload.path", "offload=nvme"),
    (["offload=nvme", "engine=stream", "offload.path=[]"], "offload.path", "offload.path=null"),
    (["offload=nvme", "engine=stream", "offload.path=[/a,' ']"], "offload.path", "offload.path=/a/path"),
    (["offload=nvme", "engine=stream", "offload.path=7"], "offload.path", "offload.path=/a/path"),
    (["offload=nvme", "engine=stream", "offload.path={a: 1}"], "offload.path", "offload.path=/a/path"),
    (["offload=nvme", "offload.path=[/a,/b]"], "offload.path", "offload.path=/a"),
    (["offload=nvme", "engine=accelerate", "quant=fp16", "offload.path=[/a,/b]"], "offload.path", "engine=stream"),
    (["offload=none", "offload.buffer_count=5"], "offload.buffer_count", "offload=nvme"),
    (["offload=cpu", "offload.buffer_size=1000"], "offload.buffer_size", "offload=nvme"),
    (["offload=cpu", "offload.use_gds=true"], "offload.use_gds", "offload=nvme"),
    (["offload=none", "offload.pin_memory=true"], "offload.pin_memory", "offload=cpu"),
    (["offload=nvme", "hardware=cpu", "offload.use_gds=true"], "offload.use_gds", "offload.use_gds=false"),
    (["offload=nvme", "offload.aio.block_size=5000"], "offload.aio.block_size", "1048576"),
    (["offload.resident=0.5"], "offload.resident", "engine=stream"),
    (["offload.resident=auto"], "offload.resident", "engine=stream"),
    (["engine=stream", "offload.resident=1.5"], "offload.resident", "offload.resident=auto"),
    (["engine=stream", "offload.resident=-0.1"], "offload.resident", "offload.resident=auto"),
    (["engine=stream", "offload.resident=nan"], "offload.resident", "offload.resident=auto"),
    (["engine=stream", "offload.resident=Auto"], "offload.resident", "offload.resident=auto"),
    (["engine=stream", "offload.resident=null"], "offload.resident", "offload.resident=auto"),
    (["engine=stream", "offload=none", "offload.resident=0.5"], "offload.resident", "offload=cpu"),
    (["offload.compute=0.5"], "offload.compute", "engine=stream"),
    (["engine=stream", "offload.compute=1.5"], "offload.compute", "offload.compute=auto"),
    (["engine=stream", "offload.compute=cpu"], "offload.compute", "offload.compute=auto"),
    (["engine=stream", "offload.compute=null"], "offload.compute", "offload.compute=auto"),
    (["engine=stream", "offload=none", "offload.compute=auto"], "offload.compute", "offload=cpu"),
    (["hardware.cpu_threads=4"], "hardware.cpu_threads", "engine=stream"),
    (["engine=stream", "hardware.cpu_threads=0"], "hardware.cpu_threads", "hardware.cpu_threads=null"),
    (["engine=stream", "workload.micro_batches=0"], "workload.micro_batches", "workload.micro_batches=1"),
    (["workload.micro_batches=2"], "workload.micro_batches", "engine=stream"),
    (["engine=stream", "engine.profile=tuned"], "engine.profile", "engine=deepspeed"),
    (["engine.profile=null"], "engine.profile", "engine.profile=tuned"),
    (["engine=stream", "offload=nvme", "offload.buffer_count=4"], "offload.buffer_count", "offload.buffer_count=null"),
    (["engine=stream", "offload=nvme", "offload.buffer_size=4096"], "offload.buffer_size", "offload.buffer_size=null"),
    (["engine=stream", "offload=nvme", "offload.use_gds=true"], "offload.use_gds", "offload.use_gds=false"),
    (["model=local"], "model.path", "model.path=/models/my-model"),
    (["weights=pretrained", "weights.path=null"], "weights.path", "weights.path=/models/my-model"),
    (["weights.path=/models/x"], "weights.path", "weights=pretrained"),
    (["workload.text=my.txt"], "workload.text", "weights=pretrained"),
    (["workload.prompts=my.txt"], "workload.prompts", "weights=pretrained"),
    (["workload.prompts=' '", "weights=pretrained"], "workload.prompts", "workload.prompts=/a/path"),
    (
        ["workload.prompts=my.txt", "weights=pretrained", "workload.prompt_len=1"],
        "workload.prompt_len",
        "workload.prompt_len=512",
    ),
    (["model=local", "model.path='~nobody-here/x'"], "model.path", "model.path=/a/path"),
    (
        ["workload.text=my.txt", "weights=pretrained", "workload.prompt_len=1"],
        "workload.prompt_len",
        "workload.prompt_len=512",
    ),
]


@pytest.mark.parametrize(("overrides", "key", "advice"), RULES, ids=lambda value: str(value))
def test_a_refusal_names_the_key_and_what_to_type_which_works(compose_run, overrides, key, advice):
    with pytest.raises(ConfigError, match=rf"{re.escape(key)}.*: pass .*{re.escape(advice)}") as refusal:
        compose_run(*overrides)

    assert "\n" not in str(refusal.value)
    compose_run(*overrides, advice if "=" in advice else f"{key}={advice}")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["quant.bits=3"], "quant.bits"),
        (["offload=nvme", "offload.aio.block_size=0"], "offload.aio.block_size"),
        (["offload=nvme", "offload.aio.queue_depth=0"], "offload.aio.queue_depth"),
        (["offload=nvme", "offload.aio.intra_op_parallelism=0"], "offload.aio.intra_op_parallelism"),
        (["offload=nvme", "offload.buffer_count=0"], "offload.buffer_count"),
        (["offload=nvme", "offload.buffer_size=-1"], "offload.buffer_size"),
        (["~model.architecture.model_type"], "model.architecture.model_type"),
        (["hardware.memory_gib=0"], "hardware.memory_gib"),
        (["hardware.memory_gib=nan"], "hardware.memory_gib"),  # it could not be written as JSON either
        (["hardware.host_memory_gib=inf"], "hardware.host_memory_gib"),
        (["hardware.ceilings.link_bytes_per_s=nan"], "hardware.ceilings.link_bytes_per_s"),
        (["hardware.ceilings.flops=-1"], "hardware.ceilings.flops"),
        (["hardware.host_memory_gib=-1"], "hardware.host_memory_gib"),
        (["hardware.dtypes=[float32]"], "hardware.dtypes"),
        (["model.revision=v2"], "model.revision"),
        (["model=local", "model.path=a/b", "model.revision=' '"], "model.revision"),
        (
            ["model=local", "model.path=a/b", "model.revision=v2", "weights=pretrained", "weights.path=c/d"],
            "model.revision",
        ),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_by_name(compose_run, overrides, key):
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}.*: pass ."):
        compose_run(*overrides)


@pytest.mark.parametrize("prefix", list(schema_nodes()))
def test_a_key_added_with_plus_is_refused_by_name(compose_run, prefix):
    """Hydra lets `+key` past the schema, where it would be ignored without a word."""
    with pytest.raises(ConfigError, match=rf"^{re.escape(prefix)}stray is not a setting.*{re.escape(prefix)}\w+"):
        compose_run(f"+{prefix}stray=1")


@pytest.fixture
def calibrated(compose):
    """`calibrated(**figures)` → a configuration with a calibration, as a file of `hardware` has it, of these figures."""

    def calibrated(**figures):
        cfg, nothing = compose(), {field.name: None for field in dataclasses.fields(schema.Calibration)}
        # a calibration cannot be merged into none, so that it is typed in files alone
        known = schema.Calibration(**(nothing | {"gemm_flops": {}} | figures))
        OmegaConf.update(cfg, "hardware.calibration", OmegaConf.structured(known), merge=False)
        return cfg

    return calibrated


def test_a_calibration_reaches_the_run(calibrated):
    products = {"float16": {1: 1e12, 64: 5e13}}
    found = to_run(calibrated(layer_s=1.5e-3, gemm_flops=products)).hardware.calibration

    assert isinstance(found, schema.Calibration)
    assert (found.layer_s, found.step_s, found.gemm_flops) == (0.0015, None, products)


@pytest.mark.parametrize(
    ("figures", "key"),
    [
        ({"pin_bytes_per_s": 0.5}, "hardware.calibration.pin_bytes_per_s"),
        ({"layer_s": -0.001}, "hardware.calibration.layer_s"),
        ({"step_s": nan}, "hardware.calibration.step_s"),
        ({"host_bytes_per_s": inf}, "hardware.calibration.host_bytes_per_s"),
        ({"gemm_flops": {"float16": {0: 1e12}}}, "hardware.calibration.gemm_flops.float16.0"),
        ({"gemm_flops": {"float16": {16: 1e12, 32: inf}}}, "hardware.calibration.gemm_flops.float16.32"),
        ({"gemm_flops": {"bfloat16": {16: 0.1}}}, "hardware.calibration.gemm_flops.bfloat16.16"),
    ],
    ids=str,
)
def test_a_figure_of_a_calibration_that_cannot_be_is_refused_by_name(calibrated, figures, key):
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}\b.*: pass hardware\.calibration.*=null"):
        to_run(calibrated(**figures))


def test_overheads_may_be_nothing(calibrated):
    assert to_run(calibrated(layer_s=0.0, step_s=0.0)).hardware.calibration.layer_s == 0


def test_the_schema_is_as_deep_as_the_test_of_stray_keys_thinks():
    assert {"", "workload.", "offload.aio.", "hardware.ceilings."} <= set(schema_nodes())


def test_an_architecture_takes_any_number_of_a_hugging_face_configuration(compose_run):
    run = compose_run("+model.architecture.attention_bias=true")

    assert run.model.architecture["attention_bias"] is True


@pytest.mark.parametrize(
    "override",
    [
        "workload.prompt_len=many",
        "workload.prompt_len=2.5",
        "workload.prompt_len=null",
        "offload.device=tape",
        "quant.bits=four",
        "engine.profile=fast",
        "plan_only=perhaps",
        "verify=perhaps",
        "tracking.mode=sometimes",
        "hardware.ceilings.flops=fast",
    ],
)
def test_a_wrong_type_fails_at_compose(compose, override):
    with pytest.raises(ConfigCompositionException, match=re.escape(override)):
        compose(override)


@pytest.mark.parametrize("key", ["workload.batchsize", "batch_size", "offload.aio.thread_count", "quant.symmetric"])
def test_an_unknown_key_fails_at_compose(compose, key):
    with pytest.raises(ConfigCompositionException, match=re.escape(key)):
        compose(f"{key}=1")


def test_an_unknown_choice_lists_the_known_ones(compose):
    with pytest.raises(ConfigCompositionException, match=r"opt-13b"):
        compose("model=opt-13")


def test_an_unknown_engine_lists_the_known_ones(compose):
    with pytest.raises(ConfigCompositionException, match=r"(?s)accelerate.*deepspeed.*fsdp.*stream"):
        compose("engine=nonsense")


@pytest.mark.parametrize("name", ["hf_session", "modules", "stream.ring", "nonsense"])
def test_what_is_no_engine_lists_those_that_are(make_plan, name):
    with pytest.raises(
        ConfigError, match=rf"^engine\.name={name} .*: pass engine=accelerate, deepspeed, fsdp or stream$"
    ):
        make_plan("engine=stream", f"engine.name={name}", "quant=fp16")


def test_a_missing_value_is_refused_by_name(compose):
    with pytest.raises(ConfigError, match=r"^workload.batch_size: .*pass workload.batch_size="):
        to_run(compose("workload.batch_size=???"))


def test_an_interpolation_to_nowhere_is_refused_by_name(compose):
    with pytest.raises(ConfigError, match=r"^name: .*nowhere"):
        to_run(compose("name='${nowhere}'"))


def test_all_that_is_missing_is_refused_at_once_with_values_that_work(compose_run):
    """A choice of the user's own that lacks settings; the name of the run is made of one of them."""
    lacking = [f"{key}=???" for key in ("model.name", "offload.aio", "quant.bits", "hardware.ceilings", "verify")]

    with pytest.raises(
        ConfigError, match=r"^hardware.ceilings, model.name, offload.aio, quant.bits, verify: "
    ) as refusal:
        compose_run(*lacking)

    examples = shlex.split(str(refusal.value).partition(": pass ")[2].partition(", or ")[0])
    assert len(examples) == 5
    assert compose_run(*lacking, *examples).name == "mine-cpu-int4"


def test_a_stray_key_is_told_what_it_was_meant_to_be(compose_run):
    for typed, meant in (
        ("+offlod=cpu", "offload=cpu"),
        ("+workload.batchsize=4", "workload.batch_size=4"),
        ("+bits=8", "quant.bits=8"),
        ("+seed=1", "weights.seed=1 or workload.seed=1"),
    ):
        with pytest.raises(ConfigError, match=rf"is not a setting \(it was added with '\+'\): pass {meant}$"):
            compose_run(typed)


def test_a_local_model_is_called_after_its_folder(compose_run):
    assert compose_run("model=local", "model.path=/models/my-llama").name == "my-llama-cpu-int4"


def test_a_pretrained_checkpoint_is_by_default_the_model_s_own(compose_run):
    assert compose_run("model=opt-1.3b", "weights=pretrained").weights.path == "facebook/opt-1.3b"


def test_a_choice_of_the_users_own(tmp_path):
    own = tmp_path / "own" / "model" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("name: mine\npath: null\narchitecture: {model_type: opt, hidden_size: 64}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    shown = cli("--config-dir", str(tmp_path / "own"), "model=mine", "--cfg", "job", "--resolve", cwd=elsewhere)

    assert shown.returncode == 0, shown.stderr
    composed = OmegaConf.create(shown.stdout)
    assert composed.name == "mine-cpu-int4"
    assert composed.model.architecture == {"model_type": "opt", "hidden_size": 64}
    assert os.listdir(elsewhere) == []


def test_help_shows_the_groups_and_three_examples(tmp_path):
    shown = cli("--help", cwd=tmp_path)

    assert shown.returncode == 0, shown.stderr
    for group in GROUPS:
        choices = ", ".join(choice for owner, choice in CHOICES if owner == group)
        assert f"{group}: {choices}" in shown.stdout
    examples = shown.stdout.partition("Examples")[2]
    assert len(re.findall(r"^ +python -m zi_experiments", examples, re.MULTILINE)) == 3


def test_the_examples_of_help_compose(compose_run, tmp_path):
    examples = re.findall(r"^ +python -m zi_experiments(.*)$", cli("--help", cwd=tmp_path).stdout, re.MULTILINE)

    for example in examples:
        words = [word.split(",")[0] for word in example.split() if word != "-m"]
        compose_run(*words)


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job", "--resolve"]], ids=" ".join)
def test_asking_imports_no_torch(tmp_path, arguments):
    shown = cli(*arguments, cwd=tmp_path, python_options=["-X", "importtime"])

    assert shown.returncode == 0, shown.stderr
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in shown.stderr.splitlines()}
    assert "zi_experiments" in imported
    assert imported.isdisjoint({"torch", "transformers", "deepspeed", "wandb"})


def test_a_wrong_choice_on_the_command_line_exits_with_an_error(tmp_path):
    shown = cli("offload=tape", "--cfg", "job", cwd=tmp_path)

    assert shown.returncode == 1
    assert "none" in shown.stderr
    assert "nvme" in shown.stderr


def test_conf_lies_beside_the_package_or_inside_it():
    package = Path(zi_experiments.__file__).parent

    assert conf_dir() in (package / "conf", package.parent / "conf")
    assert (conf_dir() / "config.yaml").is_file()
