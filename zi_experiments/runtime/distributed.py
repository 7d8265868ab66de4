"""Start torch.distributed, in a worker or in the user's own process."""

import socket
from dataclasses import dataclass
from typing import Any

from zi_experiments import environment
from zi_experiments.config.schema import ConfigError
from zi_experiments.system import toolchain


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the workers of one launcher are among all ranks of a run, when there are several launchers."""

    first: int  # rank of its first worker
    workers: int
    ranks: int  # of the whole run
    local_number: int  # of the launcher among those on its machine
    sees_all: bool  # whether it sees all GPUs of the run on its machine; else those of its own workers
    host: str  # name of the machine, for messages
    address: str  # where the first launcher has the store of this run
    port: int
    interface: str | None  # network interface through which the launchers have met

    @property
    def first_local(self) -> int:
        """Which of the GPUs that it sees its first worker has."""
        return self.local_number * self.workers if self.sees_all else 0

    def variables(self, worker: int) -> dict[str, str]:
        """Return what torch.distributed reads in a worker, by its number under its launcher."""
        return {
            "RANK": str(self.first + worker),
            "LOCAL_RANK": str(self.first_local + worker),
            "WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the launcher listens there, not rank 0
        }

    def defaults(self) -> dict[str, str]:
        """Return variables for workers that may be set already: gloo would take the interface of the host's name."""
        return {"GLOO_SOCKET_IFNAME": self.interface} if self.interface else {}


def init(device: str) -> None:
    """Initialise the back end: NCCL on CUDA, gloo otherwise, never through MPI.

    Outside a launcher (none of RANK, WORLD_SIZE, … set) this process becomes the only rank, on a free port.
    Raises `ConfigError` when a launcher has set only some of the variables, or a port that is in use.
    """
    launcher = toolchain.launcher_variables()
    if launcher.fix is not None:
        raise ConfigError(f"{launcher.found}: {launcher.fix}")
    if not environment.distributed_variables():
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        environment.set_variables(alone | {"MASTER_PORT": str(_free_port())})
    import torch

    if device == "cuda":
        torch.cuda.set_device(launched_local_rank())
    if not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        except torch.distributed.DistNetworkError as error:
            if "EADDRINUSE" in str(error):
                raise ConfigError(_taken()) from error
            raise


def _taken() -> str:
    launched = environment.distributed_variables()
    address = f"{launched['MASTER_ADDR']}:{launched['MASTER_PORT']}"
    return (
        f"MASTER_ADDR:MASTER_PORT is {address}, where another program listens: set MASTER_PORT={_free_port()} (free now), "
        "the same for every rank"
    )


def leave(kind: type[BaseException] | None, *_: Any) -> None:
    """Shut down the back end, as NCCL requires; to be pushed on an `ExitStack`.

    A failed rank skips this when there are others: it would wait for ranks that may be waiting for it.
    """
    import torch.distributed

    if torch.distributed.is_initialized() and (kind is None or torch.distributed.get_world_size() == 1):
        torch.distributed.destroy_process_group()


def rank() -> int:
    import torch.distributed

    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def ranks() -> int:
    import torch.distributed

    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def barrier() -> None:
    import torch.distributed

    torch.distributed.barrier()


def from_first_rank(value: Any) -> Any:
    """Return the first rank's `value` on every rank."""
    import torch.distributed

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def from_all_ranks(value: Any) -> list[Any]:
    """Return the values of all ranks, in rank order, on every rank."""
    import torch.distributed

    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launched_rank() -> int:
    """Return the rank that the launcher gave this process; works before `init`."""
    return int(environment.distributed_variables().get("RANK", "0"))


def launched_ranks() -> int:
    """Return the number of ranks that the launcher started; 1 without a launcher."""
    return int(environment.distributed_variables().get("WORLD_SIZE", "1"))


def launched_local_rank() -> int:
    """Return the rank on this machine that the launcher gave this process."""
    return int(environment.distributed_variables().get("LOCAL_RANK", "0"))
