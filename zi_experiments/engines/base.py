"""What an engine is: a module that loads a planned model and generates with it, by the name of its `conf/engine` file."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from zi_experiments.config.schema import ConfigError, Run, conf_dir, literal
from zi_experiments.cost_model.inventory import Inventory, Stored
from zi_experiments.cost_model.plan import Plan, Storage
from zi_experiments.cost_model.spec import Spec
from zi_experiments.runtime.progress import Progress
from zi_experiments.system.disk import Disk


class Session(Protocol):
    """A loaded model on one rank."""

    model: Any  # the Hugging Face module, in eval mode

    def generate(self, input_ids: Any, gen_len: int, streamer: Any) -> Any:
        """Generate exactly `gen_len` tokens greedily.

        `input_ids` is int64 of shape (sequences of this rank, prompt_len); returns (sequences, prompt_len + gen_len).
        """

    def inventory(self) -> Inventory:
        """What this rank holds of the weights, as it is found in memory and on disk."""

    def parked(self) -> AbstractContextManager[None]:
        """While it is entered the model does not run, and `Storage.parked_bytes` of the GPU's weights are in host memory."""

    def close(self) -> None: ...


class Engine(Protocol):
    """What an engine's module has: all that is known of it outside of `engines/`."""

    OPTIONS: frozenset[str]  # the settings of `OPTIONAL` that it uses, by their dotted names
    CONFIG_NAME: str  # of what `config` returns, in the record and as a file beside it

    def check(self, run: Run) -> None:
        """Raise `ConfigError` for a run that the engine cannot carry out, whatever the model and the machine."""

    def storage(self, spec: Spec) -> Storage:
        """Where the engine keeps the weights; figures only, on any machine.

        Raises `ConfigError` for a model or a machine that the engine cannot do with.
        """

    def stored(self, plan: Plan) -> dict[str, Stored]:
        """How the engine should hold each parameter of a plan, by name: what a session's `inventory` is compared with."""

    def requirements(self, plan: Plan) -> Iterator[str]:
        """What this machine lacks for a plan: a line for each, which says what to type."""

    def disk_access(self, run: Run, folder: Path) -> Disk:
        """How the engine reads the weights of a run with `offload=nvme` from a folder, for its disk to be measured so."""

    def config(self, plan: Plan, scratch: str | None) -> dict[str, Any]:
        """The engine's own configuration for a plan, as it goes into the record; `scratch` is the run's folder on disk."""

    def prepare(self, plan: Plan, progress: Progress) -> None:
        """What must happen once before loading and is not part of its time: builds, the distributed back end."""

    def load(self, plan: Plan, config: dict[str, Any], progress: Progress) -> Session:
        """Load the planned model in this worker process."""


# settings that not every engine uses, and what they are when nothing is asked for
OPTIONAL: dict[str, Any] = {
    "engine.profile": None,
    "offload.resident": 0,
    "offload.buffer_count": None,
    "offload.buffer_size": None,
    "offload.use_gds": False,
    "offload.aio.block_size": None,
    "offload.aio.queue_depth": None,
    "offload.aio.intra_op_parallelism": None,
    "offload.aio.single_submit": None,
    "offload.aio.overlap_events": None,
    "workload.micro_batches": 1,
}


def get(name: str) -> Engine:
    """The engine of that name. Raises `ConfigError` when there is none."""
    module = f"zi_experiments.engines.{name}"
    found: Any = None
    if name.isidentifier():
        try:
            found = import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    if not hasattr(found, "load"):
        *others, last = names()
        raise ConfigError(f"engine.name={name} is not an engine: pass engine={', '.join(others)} or {last}")
    engine: Engine = found
    return engine


def names() -> list[str]:
    """The engines that there are, by their choices in `conf/engine`."""
    return sorted(path.stem for path in (conf_dir() / "engine").glob("*.yaml"))


def check(run: Run) -> None:
    """Raise `ConfigError` for a run that its engine cannot carry out, or with a setting that it would not look at."""
    engine = get(run.engine.name)
    for key, unset in OPTIONAL.items():
        value = reduce(getattr, key.split("."), cast(Any, run))
        if value != unset and key not in engine.OPTIONS:
            users = [name for name in names() if key in get(name).OPTIONS]
            raise ConfigError(
                f"{key}={literal(value)} is only used with engine={' or '.join(users)}, not engine={run.engine.name}: "
                f"pass {key}={literal(unset)}, or engine={users[0]}"
            )
    engine.check(run)
