"""Rank variants of a run by their planned speed: single changes that make it faster, and candidates for a search."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, dropwhile, product, takewhile
from math import log
from typing import Any

from zi_experiments.config.schema import CacheDevice, ConfigError, OffloadDevice, Profile, Run
from zi_experiments.cost_model.bound import Bound, lower_bound
from zi_experiments.cost_model.plan import Plan
from zi_experiments.cost_model.prediction import Prediction, predict, total_tok_per_s
from zi_experiments.engines import base
from zi_experiments.models.architecture import Architecture
from zi_experiments.planner import alternatives, planning
from zi_experiments.planner.alternatives import Change
from zi_experiments.system.machines import Machine

SETTINGS: tuple[tuple[str, Any], ...] = (
    ("offload.resident", "auto"),
    ("engine.profile", Profile.tuned),
    ("offload.pin_memory", True),
)
MICRO_BATCHES = (1, 2, 4, 8, 16)
NOTICEABLE = 1.03  # a smaller gain is within the scatter of predictions and measurements
MUCH = 1.1  # gain of a change that a run is told about
HOST_SHARE = 0.9  # share of the available host memory that candidates may use
MOST_TIMES = 16  # limit of an advised batch, as a multiple of the run's: latency grows with the batch
NEIGHBOURS = 4  # other batch sizes that a search measures before other choices
VARIED = frozenset({"workload.batch_size", "workload.micro_batches", "kv_cache", "kv_cache.device", "offload.resident"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """The planned speed of a run."""

    ttft_s: float
    tpot_s: float
    tok_per_s: float  # generated tokens per second over prefill and decode
    is_predicted: bool  # False: the values are bounds, because the machine was not measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A run that fits, and its planned speed."""

    text: str  # overrides to add to the command line
    run: Run
    pace: Pace

    @property
    def tok_per_s(self) -> float:
        return self.pace.tok_per_s

    @property
    def sequences(self) -> int:
        return self.run.workload.sequences


def paced(plan: Plan) -> Pace | None:
    """Return the predicted speed of a plan, or its bound on a machine that was not measured; None if unknown."""
    known = plan.machine.calibration is not None
    times: Prediction | Bound = predict(plan) if known else lower_bound(plan)
    tok_per_s = total_tok_per_s(plan, times.prefill_s, times.decode_step_s)
    if times.prefill_s is None or times.decode_step_s is None or tok_per_s is None:
        return None
    return Pace(ttft_s=times.prefill_s, tpot_s=times.decode_step_s, tok_per_s=tok_per_s, is_predicted=known)


def improvements(plan: Plan) -> list[Candidate]:
    """Return the variants that differ by one change and are noticeably faster by plan, the fastest first."""
    run, arch, machine = plan.run, plan.architecture, plan.machine
    now = paced(plan)
    if now is None:
        return []
    near = (*alternatives.one(run, machine.gpus_visible), *_settings(run))
    found = [rated for each in near if (rated := _rated(each, arch, machine))]
    if larger := _larger_batches(run, arch, machine):
        found.append(_best(larger))
    return sorted(
        (each for each in found if each.tok_per_s > NOTICEABLE * now.tok_per_s), key=lambda one: -one.tok_per_s
    )


def faster(plan: Plan) -> Candidate | None:
    """Return the best single change that keeps the workload, if it is predicted to gain much; else None.

    A larger batch is another workload: it has more tokens per second, and each sequence waits longer for its own.
    """
    now, same = paced(plan), (each for each in improvements(plan) if each.run.workload == plan.run.workload)
    best = next(same, None)
    return best if now and best and now.is_predicted and best.tok_per_s >= MUCH * now.tok_per_s else None


def _larger_batches(run: Run, arch: Architecture, machine: Machine) -> list[Candidate]:
    """Return candidates with larger batches that fit: powers of two per rank, up to `MOST_TIMES` times the run's batch."""
    ranks, batch_size = run.hardware.num_gpus, run.workload.batch_size
    sizes = (ranks << n for n in range(planning.MOST_SEQUENCES.bit_length()))
    larger = takewhile(lambda size: size <= MOST_TIMES * batch_size, dropwhile(lambda size: size <= batch_size, sizes))
    found = (_rated(_with_batch(Change(text="", run=run), size), arch, machine) for size in larger)
    return [each for each in found if each is not None]


def _settings(run: Run) -> Iterator[Change]:
    for key, value in SETTINGS:
        yield from alternatives.with_setting(run, key, value)


def settle(run: Run, arch: Architecture, machine: Machine) -> Run | None:
    """Return the run itself, or with `search.rank` the candidate of that rank; None if there are fewer candidates."""
    rank = run.search.rank
    if rank is None:
        return run
    found = candidates(run, arch, machine)
    return found[rank].run if rank < len(found) else None


def candidates(run: Run, arch: Architecture, machine: Machine) -> list[Candidate]:
    """Return the candidates of a search, in the order in which it measures them.

    They vary batch size, micro-batches, KV cache placement and the share of the weights kept on the GPU, except what was
    typed. First is the best by plan, then a few other batch sizes of it, for the curve, then the best of each other
    combination, then its remaining batch sizes. Raises `ConfigError` when none fits, or no rates are known.
    """
    fixed = sorted({text.lstrip("+").partition("=")[0] for text in run.search.typed} & VARIED)
    plain = replace(run, search=replace(run.search, rank=None, typed=fixed))
    # a margin, because available memory changes from one run of a sweep to the next
    roomy = replace(machine, host_memory_bytes=int(HOST_SHARE * machine.host_memory_bytes))
    return _candidates(_Identity(run=plain, arch=arch, machine=roomy))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Identity:
    """Cache key: everything a ranking depends on. All runs of a sweep have the same."""

    run: Run
    arch: Architecture
    machine: Machine

    def __hash__(self) -> int:
        return hash(repr(self.run))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and (self.run, self._lasting) == (other.run, other._lasting)

    @property
    def _lasting(self) -> Machine:
        """The machine without the values that differ from one run of a sweep to the next."""
        return replace(self.machine, host_memory_bytes=0, disk_free_bytes=None)


@lru_cache(maxsize=1)
def _candidates(of: _Identity) -> list[Candidate]:
    arch, machine = of.arch, of.machine
    curves = [_curve(kind, arch, machine) for kind in _kinds(of.run, machine)]
    ranked = sorted((curve for curve in curves if curve), key=lambda curve: -_best(curve).tok_per_s)
    if not ranked:
        planning.build(of.run, arch, machine)  # raises if the run does not fit
        raise ConfigError("no rates of this machine are known, so a search cannot rank candidates: pass hardware=auto")
    best, *others = [_best(curve) for curve in ranked]
    sizes = sorted(ranked[0], key=lambda each: abs(log(each.sequences / best.sequences)))[1:]
    return [best, *sizes[:NEIGHBOURS], *others, *sizes[NEIGHBOURS:]]


def _kinds(run: Run, machine: Machine) -> Iterator[Change]:
    """Yield the run with every combination of the choices that a search varies, except the batch size."""
    options, fixed = base.get(run.engine.name).OPTIONS, set(run.search.typed)
    streams = "workload.micro_batches" in options - fixed
    moves = machine.device == "cuda" and not fixed & {"kv_cache", "kv_cache.device"}
    keeps = "offload.resident" in options - fixed and run.offload.device is not OffloadDevice.none
    places = tuple(CacheDevice) if moves else (run.kv_cache.device,)
    residents = ("auto", 0) if keeps else (run.offload.resident,)
    counts = MICRO_BATCHES if streams else (run.workload.micro_batches,)
    for micro_batches, place, resident in product(counts, places, residents):
        copy = replace(
            run,
            workload=replace(run.workload, micro_batches=micro_batches),
            kv_cache=replace(run.kv_cache, device=place),
            offload=replace(run.offload, resident=resident),
        )
        text = f" kv_cache={place.value}" if len(places) > 1 else ""
        text += f" offload.resident={resident}" if len(residents) > 1 else ""
        text += f" workload.micro_batches={micro_batches}" if streams else ""
        yield Change(text=text, run=copy)


def _curve(kind: Change, arch: Architecture, machine: Machine) -> list[Candidate]:
    """Return candidates with the batch sizes that fit: powers of two per rank, and the largest."""
    ranks, size = kind.run.hardware.num_gpus, kind.run.workload.batch_size
    if "workload.batch_size" in kind.run.search.typed and size != "auto":
        return [each] if (each := _rated(_with_batch(kind, size), arch, machine)) else []
    largest = planning.largest_batch(kind.run, arch, machine)
    doublings = takewhile(lambda size: size < largest, (ranks << n for n in count()))
    found = (_rated(_with_batch(kind, size), arch, machine) for size in (*doublings, largest) if largest)
    return [each for each in found if each is not None]


def _with_batch(kind: Change, batch_size: int) -> Change:
    run = replace(kind.run, workload=replace(kind.run.workload, batch_size=batch_size))
    return Change(text=f"workload.batch_size={batch_size}{kind.text}", run=run)


def _best(curve: list[Candidate]) -> Candidate:
    """Return the candidate with the smallest batch that is about as fast as the fastest."""
    fastest = max(each.tok_per_s for each in curve)
    return next(each for each in curve if each.tok_per_s * NOTICEABLE >= fastest)


def _rated(change: Change, arch: Architecture, machine: Machine) -> Candidate | None:
    """Return a variant with its planned speed; None if it does not fit, or its speed is unknown."""
    plan = planning.attempt(change.run, arch, machine)
    pace = paced(plan) if plan else None
    return Candidate(text=change.text, run=plan.run, pace=pace) if plan and pace else None
