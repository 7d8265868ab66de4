"""Engines: each loads a planned model and generates with it. One file each, found by the name of its YAML file."""

from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Protocol

from zi_experiments.config.schema import ConfigError
from zi_experiments.cost_model.inventory import Inventory, Stored
from zi_experiments.cost_model.plan import Plan, Storage
from zi_experiments.runtime.progress import Progress


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
    def storage(self, plan: Plan) -> Storage:
        """Where the engine keeps a plan's weights; figures only, on any machine.

        Raises `ConfigError` for what the engine cannot do.
        """

    def stored(self, plan: Plan) -> dict[str, Stored]:
        """How the engine should hold each parameter of a plan, by name: what a session's `inventory` is compared with."""

    def config(self, plan: Plan, scratch: str | None) -> dict[str, Any]:
        """The engine's own configuration for a plan, as it goes into the record."""

    def prepare(self, plan: Plan, progress: Progress) -> None:
        """What must happen once before loading and is not part of its time: builds, the distributed back end."""

    def load(self, plan: Plan, config: dict[str, Any], progress: Progress) -> Session:
        """Load the planned model in this worker process."""


def get(name: str) -> Engine:
    """The engine of that name. Raises `ConfigError` when there is none."""
    module = f"zi_experiments.engines.{name}"
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        found = None
    if not hasattr(found, "load"):
        raise ConfigError(f"engine.name={name} is not an engine: pass engine=deepspeed, stream, accelerate or fsdp")
    engine: Engine = found
    return engine
