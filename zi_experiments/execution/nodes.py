"""The launchers of one command, on several machines or under torchrun: what the first of them asks of the others."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zi_experiments import environment, provenance
from zi_experiments.config.schema import ConfigError, Run
from zi_experiments.cost_model.plan import Plan
from zi_experiments.execution.failures import WorkerError
from zi_experiments.results.record import Failure, Record, Status
from zi_experiments.runtime.distributed import Place
from zi_experiments.runtime.rendezvous import Hello, Met

if TYPE_CHECKING:
    from zi_experiments.execution.worker import Measurement  # it imports torch

STOP, STOPPED = "stop", "stopped"

_LOOK_S = 0.1
_GRACE_S = 2.0  # in which the cause of a failure elsewhere arrives
_PATIENCE_S = 15.0  # for another launcher to end its workers


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One run, as the first launcher sends it to the others."""

    plan: Plan
    record: Record  # as it is before the run: what is left if the first launcher is lost
    ranks_each: int  # workers of each launcher
    address: str
    port: int
    interface: str | None  # for launchers on the machine of the first


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """What another launcher answers to `Work` when its workers have finished."""

    results: dict[int, "Measurement"]  # by rank
    host: str
    host_peak_bytes: int
    disk_peak_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """What it answers when they have not."""

    status: Status
    failure: Failure


@dataclass(frozen=True, slots=True)
class When:
    """The phase of the run, as text; the first launcher alone hears of it from its workers."""

    text: str


@dataclass(frozen=True, slots=True)
class Over:
    """The command has ended with this exit code."""

    code: int


class Group:
    """The first launcher's side: one run at a time, on all launchers."""

    def __init__(self, met: Met, own: Hello, launched: environment.Launched | None) -> None:
        self.met = met
        self.own = own
        self.launched = launched
        self._answers: dict[int, Done | Failed | str] = {}
        self._lost: WorkerError | None = None
        self._said = self._run_id = ""

    @property
    def processes(self) -> int:
        return len(self.met.peers) + 1

    @property
    def hosts(self) -> list[str]:
        """Names of the machines, in the order of their launchers."""
        return list(dict.fromkeys([self.own.host, *(peer.host for peer in self.met.peers)]))

    @contextmanager
    def at_work(self, plan: Plan, record: Record) -> Iterator[Place]:
        """Have all launchers carry out a plan meanwhile; yield the place of this one's workers.

        At the end all have finished, and `done` has their answers. Raises `WorkerError` when one fails or is lost; then
        the others have been stopped.
        """
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        if self._lost:
            raise self._lost
        self._answers.clear()
        self._run_id, self._said = record.run.id, ""
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # on a free port
        work = Work(
            plan=plan,
            record=record,
            ranks_each=plan.run.hardware.num_gpus // self.processes,
            address=self.met.host,
            port=store.port,
            interface=self.met.interface,
        )
        for peer in self.met.peers:
            peer.send(work)
        try:
            yield place(work, self.own, self.met)
            self._wait(plan.run.launch.timeout_s)
        except WorkerError as error:
            raise self._cause(error) from None
        except KeyboardInterrupt as interrupt:
            if lost := self._lost:
                raise KeyboardInterrupt(f"{interrupt}, after {lost.failure.message}") from None
            raise
        finally:
            self._stop()

    def done(self) -> list[Done]:
        """Return the answers of the other launchers after a run that all have finished."""
        return [answer for answer in self._answers.values() if isinstance(answer, Done)]

    def tell(self, when: str) -> None:
        """Tell the others in which phase the run is."""
        if when != self._said:
            self._said = when
            for peer in self.met.peers:
                peer.send(When(when))

    def failure(self) -> WorkerError | None:
        """Return the failure of another launcher that has come in by now, or of one that is lost; waits for nothing."""
        for peer in self.met.peers:
            while (message := peer.receive(0)) is not None:
                run_id, answer = message
                if run_id == self._run_id:  # one of an earlier run may have come too late for that
                    self._answers[peer.number] = answer
            how = peer.lost()
            if how and self._lost is None:
                self._lost = lost(peer.number, peer.host, how)
        failed = [answer for answer in self._answers.values() if isinstance(answer, Failed)]
        found = [WorkerError(each.status, each.failure) for each in failed]
        return min([*([self._lost] if self._lost else []), *found], key=_order, default=None)

    def leave(self, code: int) -> None:
        """Tell the others that the command has ended."""
        for peer in self.met.peers:
            peer.send(Over(code))

    def _wait(self, timeout_s: float) -> None:
        """Wait until all have answered."""
        until = time.monotonic() + timeout_s
        while len(self._answers) < len(self.met.peers):
            if error := self.failure():
                raise error
            if time.monotonic() > until:
                message = f"not all launchers have ended within {timeout_s:g} s after the first one's workers"
                raise WorkerError("killed", Failure(type="Timeout", message=message))
            time.sleep(_LOOK_S)
        if error := self.failure():
            raise error

    def _cause(self, error: WorkerError) -> WorkerError:
        """Return what began it: a worker or a launcher that is killed makes those that wait for it fail."""
        until = time.monotonic() + _GRACE_S
        while _order(error) and time.monotonic() < until:
            if other := self.failure():
                error = min(error, other, key=_order)
            time.sleep(_LOOK_S)
        return error

    def _stop(self) -> None:
        """Have those that have not answered end their workers, and wait until they have."""
        until = time.monotonic() + _PATIENCE_S
        pending = [peer for peer in self.met.peers if peer.number not in self._answers]
        for peer in pending:
            peer.send(STOP)
        while any(peer.number not in self._answers and not peer.lost() for peer in pending):
            self.failure()
            if time.monotonic() > until:
                break
            time.sleep(_LOOK_S)


def _order(error: WorkerError) -> int:
    """Return a lower number for what is rather the cause of other failures."""
    kind = error.failure.type
    return 0 if kind == "Lost" else 1 if kind.startswith("SIG") or error.status == "oom" else 2


def lost(number: int, host: str, how: str) -> WorkerError:
    """Return the failure of a launcher that is gone."""
    message = f"launcher {number} on {host} is lost: {how}"
    hint = f"look at {host}: whether it was stopped, has run out of memory, or has no network"
    return WorkerError("killed", Failure(type="Lost", message=message, hint=hint))


def place(work: Work, own: Hello, met: Met) -> Place:
    """Return where a launcher's workers are among all of a run."""
    from zi_experiments.system import machines

    each, run = work.ranks_each, work.plan.run
    on_gpus = work.plan.machine.device == "cuda"
    # a launcher such as srun may show each process only the GPUs that are its own
    sees_all = not on_gpus or machines.gpu_count() >= run.hardware.num_gpus // run.launch.nnodes
    return Place(
        first=own.number * each,
        workers=each,
        ranks=run.hardware.num_gpus,
        local_number=own.local_number,
        sees_all=sees_all,
        host=own.host,
        address=work.address,
        port=work.port,
        interface=work.interface if met.interface == "lo" else met.interface,
    )


_group: Group | None = None
_problem: WorkerError | None = None


def set_group(group: Group) -> None:
    """Note that this process is the first launcher of several."""
    global _group
    _group = group


def set_problem(message: str) -> None:
    """Note that the others have not come, for the record of each run."""
    global _problem
    _problem = WorkerError("killed", Failure(type="Lost", message=message))


def group() -> Group | None:
    """Return the group that this process is the first of; None: it is alone."""
    return _group


def described() -> dict[str, Any]:
    """Return what the record's environment says of the machines of this command."""
    return {"machines": _group.hosts} if _group else {}


def peaks(host_bytes: int, disk_bytes: int) -> tuple[int, int]:
    """Return the peaks of host memory and disk on the machine that has used most, from those of this launcher."""
    if _group is None:
        return host_bytes, disk_bytes
    hosts, disks = Counter({_group.own.host: host_bytes}), Counter({_group.own.host: disk_bytes})
    for other in _group.done():
        hosts[other.host] += other.host_peak_bytes
        disks[other.host] += other.disk_peak_bytes
    return max(hosts.values()), max(disks.values())


def workers_of_each(run: Run) -> int | None:
    """Return how many workers each launcher has; None where there is only one launcher."""
    return run.hardware.num_gpus // _group.processes if _group else None


def check(run: Run) -> None:
    """Raise `ConfigError` for a run that is not for as many machines as have met, or `WorkerError` if they have not."""
    if _problem is not None:
        raise _problem
    if _group is None and run.launch.nnodes > 1:
        raise ConfigError(
            f"launch.nnodes={run.launch.nnodes} holds for a whole command that carries out its runs itself: "
            "type one number, and leave hydra/launcher out"
        )
    if _group is None:
        return
    if problem := _difference(_group):
        raise ConfigError(problem)
    if run.hardware.num_gpus % _group.processes:
        raise ConfigError(
            f"hardware.num_gpus={run.hardware.num_gpus} cannot be divided among {_group.processes} launchers: "
            f"pass hardware.num_gpus={_group.processes}"
        )
    if _group.launched is None and run.launch.nnodes != _group.processes:
        raise ConfigError(
            f"launch.nnodes={run.launch.nnodes} and {_group.processes} machines have met: "
            f"pass launch.nnodes={_group.processes} for all runs of a sweep"
        )


def _difference(group: Group) -> str | None:
    """Return how the command or the code of another launcher differs."""
    for other in group.met.hellos:
        if other.command != group.own.command:
            typed = " ".join(other.command)
            return f"launcher {other.number} on {other.host} was started with {typed}: type the same on all machines"
        for name, version in group.own.code.items():
            if other.code.get(name) != version:
                return (
                    f"launcher {other.number} on {other.host} has {name} {other.code.get(name)}, and {group.own.host} has "
                    f"{version}: install the same on all machines"
                )
    return None


def leave(code: int) -> None:
    """Tell the other launchers that this command, if it is the first, ends with that exit code."""
    if _group is not None:
        _group.leave(code)


def hello(number: int, launched: environment.Launched | None) -> Hello:
    """Return what this process says of itself."""
    return Hello(
        number=number,
        local_number=launched.local_number if launched else 0,
        host=provenance.host(),
        command=sorted(sys.argv[1:]),
        code=provenance.code(),
    )
