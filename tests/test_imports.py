"""The flow goes one way: an import that points back, or that costs more than its room may, fails here."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import zi_experiments

PACKAGE = Path(zi_experiments.__file__).parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    or "zi_experiments": path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}
LAUNCHER = ("config", "compose", "plan", "ds_config", "metrics", "record", "checkpoint", "preflight", "launch", "job")
HEAVY = {"torch", "transformers", "deepspeed", "accelerate", "wandb"}


def imported(tree):
    """Every dotted name that a module imports, at any depth; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(name):
    """The modules of this package that a module imports."""
    found = set()
    for dotted in imported(TREES[name]):
        owner, _, inside = dotted.partition(".")
        if owner == "zi_experiments":
            parts = inside.split(".")
            candidates = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
            found.add(next(candidate for candidate in candidates if candidate in SOURCES))
    return found


def packages(nodes):
    return {dotted.split(".")[0] for dotted in imported(nodes)}


def test_the_test_sees_the_package():
    assert {"config", "plan", "engines", "engines.deepspeed", "sinks.result_file", "__main__"} <= set(SOURCES)
    assert rooms("engines.deepspeed") >= {"ds_config", "plan", "distributed"}


def test_no_two_modules_need_each_other():
    TopologicalSorter({name: rooms(name) for name in SOURCES}).prepare()


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("folders", set()),
        ("locks", set()),
        ("signals", set()),
        ("output_folder", set()),
        ("stdio", set()),
        ("config", {"environment", "folders"}),
        ("validate", {"config"}),
        ("advice", {"config"}),
        ("compose", {"advice", "config", "validate"}),
        ("environment", set()),
        ("hub", {"environment"}),
        ("caches", {"config", "environment"}),
        ("architecture", {"config", "hub"}),
        ("hardware", {"config", "environment"}),
        ("hardware.disk", {"pinned"}),
        ("hardware.rates", {"config", "engines.stream.quantized", "engines.stream.slab", "pinned"}),
        ("hardware.overhead", {"engines.session", "measure", "progress"}),
        ("hardware.figures", {"hardware.overhead", "hardware.rates"}),
        ("hardware.child", {"environment", "hardware.disk", "hardware.figures", "scratch", "signals"}),
        ("hardware.cache", {"config", "environment", "hardware", "hardware.disk"}),
        (
            "hardware.calibration",
            {"config", "hardware", "locks", *(f"hardware.{n}" for n in ("cache", "child", "disk"))},
        ),
        ("hardware.choice", {"config", "environment", "hardware"}),
        ("inventory", set()),
        ("plan", {"config", "architecture", "hardware", "inventory"}),
        ("fit", {"config", "plan"}),
        ("changes", {"compose", "config", "validate"}),
        ("planner", {"architecture", "changes", "config", "contents", "engines", "fit", "hardware", "plan"}),
        ("predict", {"config", "plan"}),
        ("search", {"architecture", "changes", "config", "hardware", "plan", "planner", "predict"}),
        ("units", set()),
        ("explain", {"hardware.calibration", "metrics", "plan", "predict", "units"}),
        ("zero3", {"architecture", "config", "inventory", "plan"}),
        ("ds_config", {"config", "plan", "zero3"}),
        ("checkpoint", {"architecture", "config"}),
        ("contents", {"architecture", "checkpoint", "config", "weights"}),
        (
            "preflight",
            {
                "checkpoint",
                "config",
                "ds_config",
                "engines.deepspeed.ops",
                "hardware",
                "plan",
                "quality",
                "system",
                "zero3",
            },
        ),
        ("system", {"environment"}),
        ("doctor", {"caches", "environment", "hardware", "sinks.wandb", "stdio", "system"}),
        ("distributed", {"config", "environment", "system"}),
        ("generated", {"architecture", "distributed", "plan", "quality"}),
        ("engines.deepspeed.ops", {"config", "plan", "progress", "system"}),
        ("progress", set()),
        ("memory", set()),
        ("workload", set()),
        ("quality", {"architecture", "config", "plan", "progress"}),
        ("weights", {"architecture", "config"}),
        ("reference", {"architecture", "config", "plan", "weights"}),
        (
            "verify",
            {"architecture", "distributed", "engines", "hardware", "plan", "progress", "reference", "workload"},
        ),
        ("pinned", set()),
        ("kv_cache", {"pinned"}),
        ("engines.sixteen_bit", {"architecture", "config", "distributed", "inventory", "plan"}),
        ("engines.session", {"config", "inventory", "kv_cache", "plan"}),
        ("engines.modules", {"distributed", "plan"}),
        ("engines.stream.slab", {"architecture", "config", "plan"}),
        ("engines.stream.placement", {"architecture", "config", "engines.stream.slab", "inventory", "plan"}),
        ("engines.stream.quantized", {"config", "engines.stream.kernel", "engines.stream.slab"}),
        ("engines.stream.kernel", {"config"}),
        ("engines.stream.store", {"engines.stream.placement", "engines.stream.slab", "inventory"}),
        ("engines.reading", {"config", "engines.stream.placement", "hardware.disk"}),
        ("here", {"config", "engines.reading", "hardware", "hardware.calibration", "hardware.disk", "scratch"}),
        ("asked", {"config", "environment", "record"}),
        ("engines.stream.ring", {"engines.stream.store"}),
        ("engines.stream.parking", set()),
        ("engines.stream.blocks", set()),
        ("engines.stream.caches", {"config", "engines.session", "engines.stream.blocks", "plan"}),
        (
            "engines.stream.layers",
            {f"engines.stream.{name}" for name in ("blocks", "placement", "quantized", "ring", "slab")},
        ),
        ("measure", {"engines", "progress"}),
        ("metrics", {"measure", "plan", "predict"}),
        ("record", {"fit", "generated", "inventory", "measure", "metrics", "plan", "predict", "verify"}),
        ("sinks", {"record"}),
        ("sinks.console", {"explain", "generated", "plan", "predict", "record", "units"}),
        ("sinks.plan_table", {"explain", "fit", "plan", "predict", "search", "units"}),
        ("sinks.search_table", {"config"}),
        ("sinks.result_file", {"folders", "record"}),
        ("hashes", {"checkpoint"}),
        ("resume", {"folders", "record"}),
        ("scratch", {"config", "environment", "locks"}),
        ("sweep", {"config", "environment", "locks", "scratch", "signals"}),
    ],
)
def test_arrows_do_not_point_back(name, allowed):
    assert rooms(name) <= allowed


@pytest.mark.parametrize(
    ("name", "never"),
    [
        ("config", {"torch", "transformers", "deepspeed", "accelerate", "wandb"}),
        ("environment", {"torch", "transformers", "deepspeed", "accelerate", "wandb"}),
        ("plan", {"torch", "transformers", "deepspeed", "accelerate", "wandb", "psutil", "pynvml", "os"}),
        ("ds_config", {"torch", "transformers", "deepspeed", "accelerate", "wandb", "os"}),
        ("measure", {"deepspeed", "wandb"}),
        *(
            (name, {"os", "hydra", "omegaconf", *HEAVY})
            for name in ("validate", "fit", "changes", "planner", "predict", "search")
        ),
        *((name, {"os", "hydra", "omegaconf", "rich", *HEAVY}) for name in ("explain", "units")),
        ("metrics", {"torch", "transformers", "deepspeed", "wandb"}),
        ("record", {"torch", "transformers", "deepspeed", "wandb"}),
        ("workload", {"hydra", "omegaconf", "deepspeed"}),
        ("quality", {"hydra", "omegaconf", "deepspeed"}),
        ("weights", {"hydra", "omegaconf", "deepspeed", "wandb"}),
        ("checkpoint", {"hydra", "omegaconf", "transformers", "deepspeed", "wandb"}),
        ("reference", {"hydra", "omegaconf", "deepspeed", "wandb"}),
        ("verify", {"hydra", "omegaconf", "transformers", "accelerate", "deepspeed", "wandb"}),
        ("pinned", {"deepspeed", "transformers"}),
        ("kv_cache", {"hydra", "omegaconf", "deepspeed", "wandb"}),
        ("engines.sixteen_bit", {"transformers", "accelerate", "deepspeed", "wandb"}),
        ("engines.accelerate", {"hydra", "omegaconf", "transformers", "deepspeed", "wandb"}),
        ("engines.fsdp", {"hydra", "omegaconf", "transformers", "accelerate", "deepspeed", "wandb"}),
        ("engines.session", {"hydra", "omegaconf", "accelerate", "deepspeed", "wandb"}),
        ("engines.stream", {"hydra", "omegaconf", "transformers", "accelerate", "deepspeed", "wandb", "triton"}),
        ("engines.stream.slab", {"torch", "os", "hydra", "omegaconf", *HEAVY}),
        ("engines.stream.placement", {"torch", "os", "hydra", "omegaconf", *HEAVY}),
        ("engines.stream.quantized", {"triton", "transformers"}),
        ("engines.stream.store", {"transformers"}),
        ("engines.stream.ring", {"transformers"}),
        ("architecture", {"deepspeed"}),
        ("hardware", {"deepspeed", "transformers"}),
        ("hardware.disk", {"hydra", "omegaconf", *HEAVY}),
        ("hardware.child", {"hydra", "omegaconf", *HEAVY}),
        ("hardware.calibration", {"hydra", "omegaconf", *HEAVY}),
        ("hardware.rates", {"hydra", "omegaconf", "transformers", "deepspeed"}),
        ("system", {"hydra", "omegaconf", "psutil", "transformers", "deepspeed", "wandb"}),
        ("doctor", {"hydra", "omegaconf", "psutil", "transformers", "deepspeed", "wandb"}),
    ],
)
def test_a_room_never_imports_what_is_not_its_own(name, never):
    assert packages(TREES[name]).isdisjoint(never)


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("engines.stream")])
def test_streaming_knows_no_other_library_for_it(name):
    assert packages(TREES[name]).isdisjoint({"deepspeed", "accelerate", "hydra", "omegaconf", "wandb"})


def test_only_the_kernel_imports_triton():
    """CPU builds of torch come without it."""
    assert {name for name, tree in TREES.items() if "triton" in packages(tree)} == {"engines.stream.kernel"}


def test_only_its_engine_imports_deepspeed():
    users = {name for name, tree in TREES.items() if "deepspeed" in packages(tree)}

    assert users
    assert all(user.startswith("engines.deepspeed") for user in users)


def test_only_its_sink_imports_wandb():
    assert {name for name, tree in TREES.items() if "wandb" in packages(tree)} == {"sinks.wandb"}


def test_typed_past_the_door():
    """Only the entry, the door, what is before it and a callback of Hydra know the configuration as Hydra composes it."""
    users = {name for name, tree in TREES.items() if any(dotted.endswith(".DictConfig") for dotted in imported(tree))}

    assert users <= {"__main__", "advice", "asked", "compose", "job", "output_folder", "plan_only", "sweep"}


@pytest.mark.parametrize(
    "name", [*LAUNCHER, "search", "doctor", "engines.stream", "engines.stream.placement", "hardware.__main__"]
)
def test_importing_what_the_launcher_needs_loads_nothing_heavy(name):
    code = f"import sys, zi_experiments.{name}; print(*{HEAVY!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == []


def reads_environment(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv", "putenv", "unsetenv"}:
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in {"environ", "getenv", "putenv"})


def test_one_module_reads_environment_variables():
    assert {name for name, tree in TREES.items() if list(reads_environment(tree))} == {"environment"}


DEEPSPEED_KEYS = {
    "zero_optimization",
    "offload_param",
    "nvme_path",
    "leaf_module",
    "thread_count",
    "train_batch_size",
    "wall_clock_breakdown",
    "steps_per_print",
    "weight_quantization",
    "quantized_initialization",
    "memory_efficient_linear",
}


def deepspeed_keys(tree):
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if text.startswith("stage3_") or text in DEEPSPEED_KEYS:
            yield text


def test_only_ds_config_and_the_engine_know_deepspeeds_keys():
    knowing = {name for name, tree in TREES.items() if list(deepspeed_keys(tree))}

    assert "ds_config" in knowing
    assert knowing <= {"ds_config", "engines.deepspeed"}


def test_nothing_is_configured_when_a_module_is_imported():
    """No call at module level but for loggers, registration of types, and plain values."""
    harmless = {"getLogger", "TypeVar", "frozenset", "main", "compile", "Overlap", "Quant"}
    for name, tree in TREES.items():
        for statement in tree.body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                pytest.fail(f"{name}:{statement.lineno} calls something on import")
            if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Call):
                called = ast.unparse(statement.value.func).rpartition(".")[2]
                assert called in harmless, f"{name}:{statement.lineno}"
