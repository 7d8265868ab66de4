"""The interface of engines: modules that load a planned model and generate with it, named by `conf/engine` files."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from functools import reduce
from importlib import import_module
from operator import add, sub
from pathlib import Path
from typing import Any, Protocol, cast

from zi_experiments.config.command_line import literal
from zi_experiments.config.schema import ConfigError, Run, conf_dir
from zi_experiments.cost_model.inventory import Inventory, Stored
from zi_experiments.cost_model.plan import Plan, Storage
from zi_experiments.cost_model.spec import Spec
from zi_experiments.runtime.progress import Progress
from zi_experiments.system.disk import Disk


@dataclass(frozen=True, slots=True)
class Routed:
    """What passes that bring only routed experts have done since the model was loaded, on one rank."""

    layers: int  # decoder layers with experts, once for each pass
    experts: int  # distinct experts that tokens were routed to, summed over these layers
    copied: int  # of these, those that were not on the device, and that the host did not compute
    copied_bytes: int  # of experts, from host memory to the device
    read: int  # of those, or on a CPU of all, the ones that were not in host memory either
    read_bytes: int  # of experts, from disk to host memory
    own_bytes: int = 0  # of weights that are not experts and do not stay on the device, brought in these passes
    on_host: int = 0  # of the distinct experts, those that the host's cores have computed
    on_host_bytes: int = 0  # of these, which the cores have read

    def since(self, before: "Routed") -> "Routed":
        """Return what was done after `before`."""
        return Routed(*map(sub, astuple(self), astuple(before)))

    def plus(self, other: "Routed") -> "Routed":
        return Routed(*map(add, astuple(self), astuple(other)))


class ShortPasses(Protocol):
    """The part of a session that computes passes of few tokens in another way."""

    def ways(self) -> list[AbstractContextManager[None]]:
        """See `Session.ways`."""

    def counts(self) -> Routed | None:
        """See `Session.routed`."""


class Session(Protocol):
    """A loaded model on one rank."""

    model: Any  # the Hugging Face module, in eval mode

    def generate(self, input_ids: Any, gen_len: int, streamer: Any) -> Any:
        """Return prompts and exactly `gen_len` greedy tokens each, of shape (sequences, prompt_len + gen_len).

        `input_ids` is int64 of shape (sequences of this rank, prompt_len).
        """

    def inventory(self) -> Inventory:
        """Return this rank's part of the weights, as found in memory and on disk."""

    def parked(self) -> AbstractContextManager[None]:
        """Return a context with `Storage.parked_bytes` of GPU weights in host memory; the model cannot run in it."""

    def ways(self) -> list[AbstractContextManager[None]]:
        """Return a context for each way to compute a pass, of which the size of a pass selects one: for verification."""

    def routed(self) -> Routed | None:
        """Return the counts of routed passes; None if the engine brings all experts in every pass."""

    def close(self) -> None: ...


class Engine(Protocol):
    """The interface of an engine's module: all that code outside `engines/` knows of it."""

    OPTIONS: frozenset[str]  # the settings in `OPTIONAL` that it uses, by their dotted names
    CONFIG_NAME: str  # name of what `config` returns: the key in the record, and the file beside it

    def check(self, run: Run) -> None:
        """Raise `ConfigError` for settings that the engine does not support with any model, on any machine."""

    def storage(self, spec: Spec) -> Storage:
        """Return where the engine keeps the weights, and its buffers; figures only, on any machine.

        Raises `ConfigError` for a model or a machine that the engine does not support.
        """

    def stored(self, plan: Plan) -> dict[str, Stored]:
        """Return how the engine should store each parameter, by name: a session's `inventory` is compared with it."""

    def requirements(self, plan: Plan) -> Iterator[str]:
        """Yield one line for each thing that this machine lacks for a plan; the line says what to type."""

    def disk_access(self, run: Run, folders: Sequence[Path]) -> Disk:
        """Return how the engine reads weights from `folders` with `offload=nvme`; the disk is measured that way."""

    def config(self, plan: Plan, scratch: Sequence[str]) -> dict[str, Any]:
        """Return the engine's own configuration of a plan, as recorded; `scratch` has the run's folders on disk."""

    def prepare(self, plan: Plan, progress: Progress) -> None:
        """Do once what is not part of the loading time: compile operators, start the distributed back end."""

    def load(self, plan: Plan, config: dict[str, Any], progress: Progress) -> Session:
        """Load the planned model in this worker process. Return its session."""


# settings that not every engine uses, with their values when they are not set
OPTIONAL: dict[str, Any] = {
    "engine.profile": None,
    "offload.resident": 0,
    "offload.compute": "gpu",
    "offload.buffer_count": None,
    "offload.buffer_size": None,
    "offload.use_gds": False,
    "offload.aio.block_size": None,
    "offload.aio.queue_depth": None,
    "offload.aio.intra_op_parallelism": None,
    "offload.aio.single_submit": None,
    "offload.aio.overlap_events": None,
    "workload.micro_batches": 1,
    "hardware.cpu_threads": None,
}


def get(name: str) -> Engine:
    """Return the engine of that name. Raises `ConfigError` when there is none."""
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
    """Return the names of all engines, which are the choices in `conf/engine`, sorted."""
    return sorted(path.stem for path in (conf_dir() / "engine").glob("*.yaml"))


def check(run: Run) -> None:
    """Raise `ConfigError` for settings that the run's engine does not support, or would ignore."""
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
