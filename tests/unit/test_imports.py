"""The flow goes one way: an import that points back, or that costs more than its room may, fails here."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import zi_experiments
from zi_experiments.engines import base

PACKAGE = Path(zi_experiments.__file__).parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    or "zi_experiments": path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}
LAUNCHER = (
    "config.schema",
    "config.composition",
    "cost_model.plan",
    "engines.deepspeed.ds_config",
    "results.metrics",
    "results.record",
    "models.checkpoint",
    "execution.preflight",
    "execution.launcher",
    "run",
)
REPORT = (
    "dashboard.command",
    "report.command",
    "report.page",
    "report.tables",
    "report.exchange",
    "report.picture",
    "report.comparison_tables",
)
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
    assert {
        "config.schema",
        "cost_model.plan",
        "engines.base",
        "engines.deepspeed",
        "results.sinks.result_file",
        "cli",
    } <= set(SOURCES)
    assert rooms("engines.deepspeed") >= {"engines.deepspeed.ds_config", "cost_model.plan", "runtime.distributed"}


def test_no_two_modules_need_each_other():
    TopologicalSorter({name: rooms(name) for name in SOURCES}).prepare()


ORDER = (
    ("units", "environment", "quoting"),
    ("lines", "provenance"),
    ("config",),
    ("system",),
    ("runtime",),
    ("models",),
    ("cost_model",),
    ("engines",),
    ("planner",),
    ("measurement",),
    ("calibration",),
    ("results",),
    ("execution",),
    ("plan_only",),
    ("run", "api", "hardware", "doctor", "report"),
    ("cli", "dashboard"),
    ("__main__", "zi_experiments"),
)
LAYERS = {package: layer for layer, packages in enumerate(ORDER) for package in packages}


def test_each_package_has_its_layer():
    assert {name.partition(".")[0] for name in SOURCES} == set(LAYERS)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_to_the_layers_below(name):
    package = name.partition(".")[0]
    others = {each.partition(".")[0] for each in rooms(name)} - {package}

    assert {each for each in others if LAYERS[each] >= LAYERS[package]} == set()


@pytest.mark.parametrize("name", [name for name, path in SOURCES.items() if path.name == "__init__.py"])
def test_packages_are_light(name):
    """Only an engine's is more than its docstring, and the one that users import from."""
    if name not in {"zi_experiments", "engines.deepspeed", "engines.stream"}:
        assert [statement for statement in TREES[name].body if not isinstance(statement, ast.Expr)] == []


@pytest.mark.parametrize(
    ("name", "never"),
    [
        ("config.schema", {"torch", "transformers", "deepspeed", "accelerate", "wandb"}),
        *(
            (name, {"torch", "transformers", "deepspeed", "accelerate", "wandb"})
            for name in ("environment", "provenance")
        ),
        ("cost_model.plan", {"torch", "transformers", "deepspeed", "accelerate", "wandb", "psutil", "pynvml", "os"}),
        ("engines.deepspeed.ds_config", {"torch", "transformers", "deepspeed", "accelerate", "wandb", "os"}),
        ("measurement.timing", {"deepspeed", "wandb"}),
        *(
            (name, {"os", "hydra", "omegaconf", *HEAVY})
            for name in (
                "config.validation",
                "cost_model.memory_fit",
                "planner.alternatives",
                "planner.planning",
                "cost_model.prediction",
                "planner.search",
            )
        ),
        *((name, {"os", "hydra", "omegaconf", "rich", *HEAVY}) for name in ("results.explanation", "units")),
        ("results.metrics", {"torch", "transformers", "deepspeed", "wandb"}),
        ("results.record", {"torch", "transformers", "deepspeed", "wandb"}),
        ("measurement.prompts", {"hydra", "omegaconf", "deepspeed"}),
        ("measurement.perplexity", {"hydra", "omegaconf", "deepspeed"}),
        ("models.weights", {"hydra", "omegaconf", "deepspeed", "wandb"}),
        ("models.checkpoint", {"hydra", "omegaconf", "transformers", "deepspeed", "wandb"}),
        ("measurement.reference", {"hydra", "omegaconf", "deepspeed", "wandb"}),
        ("measurement.verification", {"hydra", "omegaconf", "transformers", "accelerate", "deepspeed", "wandb"}),
        ("runtime.pinned_memory", {"deepspeed", "transformers"}),
        ("engines.host_kv_cache", {"hydra", "omegaconf", "deepspeed", "wandb"}),
        ("engines.sixteen_bit", {"transformers", "accelerate", "deepspeed", "wandb"}),
        ("engines.accelerate", {"hydra", "omegaconf", "transformers", "deepspeed", "wandb"}),
        ("engines.fsdp", {"hydra", "omegaconf", "transformers", "accelerate", "deepspeed", "wandb"}),
        ("engines.hf_session", {"hydra", "omegaconf", "accelerate", "deepspeed", "wandb"}),
        ("engines.stream", {"hydra", "omegaconf", "transformers", "accelerate", "deepspeed", "wandb", "triton"}),
        ("engines.stream.slab", {"torch", "os", "hydra", "omegaconf", *HEAVY}),
        ("engines.stream.placement.choice", {"torch", "os", "hydra", "omegaconf", *HEAVY}),
        ("engines.stream.quantized", {"triton", "transformers"}),
        ("engines.stream.store", {"transformers"}),
        ("engines.stream.ring", {"transformers"}),
        ("quoting", {"os", "hydra", "omegaconf", "rich", *HEAVY}),
        ("models.architecture", {"os", "hydra", "omegaconf", *HEAVY}),
        *((f"models.{name}", {"deepspeed"}) for name in ("causal_lm", "configuration", "description", "structure")),
        ("system.machines", {"deepspeed", "transformers"}),
        ("calibration.disk", {"hydra", "omegaconf", *HEAVY}),
        ("calibration.child", {"hydra", "omegaconf", *HEAVY}),
        ("calibration.suite", {"hydra", "omegaconf", *HEAVY}),
        ("calibration.rates", {"hydra", "omegaconf", "transformers", "deepspeed"}),
        ("system.toolchain", {"hydra", "omegaconf", "psutil", "transformers", "deepspeed", "wandb"}),
        ("doctor", {"hydra", "omegaconf", "psutil", "transformers", "deepspeed", "wandb"}),
        *((name, {"hydra", "omegaconf", *HEAVY}) for name in SOURCES if name.startswith("report")),
    ],
)
def test_a_room_never_imports_what_is_not_its_own(name, never):
    assert packages(TREES[name]).isdisjoint(never)


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("engines.stream")])
def test_streaming_knows_no_other_library_for_it(name):
    assert packages(TREES[name]).isdisjoint({"deepspeed", "accelerate", "hydra", "omegaconf", "wandb"})


def test_only_kernels_import_triton():
    """CPU builds of torch come without it."""
    assert {name for name, tree in TREES.items() if "triton" in packages(tree)} == {
        "engines.stream.kernel",
        "engines.stream.pinned_kernel",
        "engines.stream.product_kernel",
        "engines.stream.scaled_kernel",
    }


def test_only_its_engine_imports_deepspeed():
    users = {name for name, tree in TREES.items() if "deepspeed" in packages(tree)}

    assert users
    assert all(user.startswith("engines.deepspeed") for user in users)


def test_an_engine_is_known_by_its_module_alone():
    """But for packages of that name, the engine that others are advised to try, and the one whose reading is measured."""
    known = set(base.names())
    naming = {
        name
        for name, tree in TREES.items()
        if any(isinstance(node, ast.Constant) and node.value in known for node in ast.walk(tree))
    }

    assert {name for name in naming if not name.startswith("engines.")} <= {
        "doctor",
        "hardware",
        "planner.alternatives",
        "provenance",
    }


def test_only_its_sink_and_the_saved_view_import_wandb():
    users = {name for name, tree in TREES.items() if packages(tree) & {"wandb", "wandb_workspaces"}}

    assert users == {"results.sinks.wandb", "dashboard.view"}


def test_typed_past_the_door():
    """Only the entry, the door, what is before it and a callback of Hydra know the configuration as Hydra composes it."""
    users = {name for name, tree in TREES.items() if any(dotted.endswith(".DictConfig") for dotted in imported(tree))}

    assert users <= {
        "cli",
        "config.errors",
        "results.initial",
        "config.composition",
        "run",
        "config.output_folder",
        "plan_only",
        "execution.sweep",
        "execution.joining",
    }


@pytest.mark.parametrize(
    "name",
    [*LAUNCHER, "planner.search", "doctor", "engines.stream", "engines.stream.placement.choice", "hardware", *REPORT],
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

    assert "engines.deepspeed.ds_config" in knowing
    assert knowing <= {"engines.deepspeed.ds_config", "engines.deepspeed"}


def test_nothing_is_configured_when_a_module_is_imported():
    """No call at module level but for loggers, registration of types, and plain values."""
    harmless = {"getLogger", "TypeVar", "frozenset", "main", "compile", "Overlap", "Quant", "Format"}
    for name, tree in TREES.items():
        for statement in tree.body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                pytest.fail(f"{name}:{statement.lineno} calls something on import")
            if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Call):
                called = ast.unparse(statement.value.func).rpartition(".")[2]
                assert called in harmless, f"{name}:{statement.lineno}"
