"""What one worker process does: load, verify, warm up, measure. Only workers of a run use devices."""

import faulthandler
import gc
import logging
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import record

from zi_experiments import environment
from zi_experiments.config.schema import Verify
from zi_experiments.cost_model import inventory
from zi_experiments.cost_model.inventory import Held
from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines import base
from zi_experiments.measurement import generated, perplexity, prompts
from zi_experiments.measurement.generated import Generated
from zi_experiments.measurement.timing import Samples, measure_passes
from zi_experiments.measurement.verification import Verification, verify
from zi_experiments.runtime import distributed, energy
from zi_experiments.runtime.progress import Progress, silent
from zi_experiments.system.machines import host_memory_available


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What a worker returns to the launcher."""

    stored: Held  # the weights of this rank
    samples: Samples | None  # None when what was loaded failed its verification
    verification: Verification | None  # None with verify=off
    perplexity: float | None = None  # None without workload.text
    kl_divergence: float | None = None
    generated: Generated | None = None  # None when nothing was measured
    gpu_peak_bytes: int  # of this rank's GPU while measuring; 0 without one


@record
def main(
    plan: Plan, config: dict[str, Any], variables: dict[str, str], channel: Connection, place: distributed.Place | None
) -> Measurement:
    """Entry point of a worker process, started by torch's elastic launcher with its variables set.

    `variables` are those of the launcher: a worker that is forked has those of when its command began. `place` is that of
    the launcher among several.
    """
    own = environment.distributed_variables()
    if place is not None:
        variables = place.defaults() | variables
        own |= place.variables(int(own["LOCAL_RANK"]))
    environment.set_variables(variables | own)
    tempfile.tempdir = None  # TMPDIR is another
    # a worker that is forked has the launcher's handlers, which write to the launcher's files
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", force=True)
    _belong_to_the_launcher()
    first = distributed.launched_rank() == 0
    progress = Progress(channel.send) if first else silent()
    _limit_gpu_memory(plan)
    engine = base.get(plan.run.engine.name)
    with ExitStack() as held:
        held.callback(gc.freeze)  # what was imported goes with the process: to look through it takes most of a second
        held.push(distributed.leave)
        engine.prepare(plan, progress)
        began = time.perf_counter()
        session = engine.load(plan, config, progress)
        held.callback(session.close)
        load_s = time.perf_counter() - began
        stored = check_stored(plan, engine, session)
        verification = verify(session, plan, progress) if plan.run.verify is Verify.on else None
        if verification is not None and not verification.passed:
            return Measurement(stored=stored, samples=None, verification=verification, gpu_peak_bytes=0)
        return _measure(plan, session, load_s, stored, verification, progress, place)


def check_stored(plan: Plan, engine: base.Engine, session: base.Session) -> Held:
    """Return what this rank holds. Raises `RuntimeError` if it is not what the plan says: figures would mislead."""
    found = session.inventory()
    if problem := inventory.difference(engine.stored(plan), found.parameters):
        raise RuntimeError(problem)
    return found.held


def _belong_to_the_launcher() -> None:
    """End with the launcher, leave Ctrl-C to it, and be the first to go when memory runs out."""
    from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the launcher asks where a process hangs
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the launcher alone decides
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
    with suppress(OSError):
        Path("/proc/self/comm").write_text(f"zi-worker-{distributed.launched_rank()}")  # for ps and top


def _measure(
    plan: Plan,
    session: base.Session,
    load_s: float,
    stored: Held,
    verification: Verification | None,
    progress: Progress,
    place: distributed.Place | None,
) -> Measurement:
    work = plan.run.workload
    ids = prompts.of_run(plan, distributed.rank(), plan.run.hardware.num_gpus)
    perplexity_of_text, kl_divergence = _perplexity(plan, session, progress)
    tokens: list[Any] = []
    with ExitStack() as held:
        run = partial(
            measure_passes,
            session,
            ids,
            work.gen_len,
            progress=progress,
            before_each=distributed.barrier,
            joules=_joules(plan, place, held),
            keep=tokens.append,
        )
        warmup = run(count=work.warmup, phase="warm-up")
        _reset_gpu_peak(plan)
        measured = run(count=work.repeats, phase="measure")
    samples = Samples(load_s=load_s, warmup=warmup, measured=measured)
    gpu_peak_bytes = _gpu_peak(plan)
    return Measurement(
        stored=stored,
        samples=samples,
        verification=verification,
        perplexity=perplexity_of_text,
        kl_divergence=kl_divergence,
        generated=generated.describe(plan, ids, tokens),
        gpu_peak_bytes=gpu_peak_bytes,
    )


def _joules(plan: Plan, place: distributed.Place | None, held: ExitStack) -> Callable[[], energy.Reading]:
    """Return what reads the energy counters. On each machine the first rank reads them, the others none.

    The first worker of a launcher that sees only its own GPUs reads these.
    """
    if distributed.rank() != (place.first if place else 0):
        return dict
    first_here, sees_all = (place.local_number == 0, place.sees_all) if place else (True, True)
    if sees_all and not first_here:
        return dict
    here = plan.run.hardware.num_gpus // plan.run.launch.nnodes
    count = here if place is None or sees_all else place.workers
    gpus = energy.visible_gpus(count) if plan.machine.device == "cuda" else []
    return held.enter_context(energy.Meter(gpus, processors=first_here)).read


def _perplexity(plan: Plan, session: base.Session, progress: Progress) -> tuple[float | None, float | None]:
    """Return perplexity and KL divergence of `workload.text`; the first rank alone has the reference of the latter."""
    work = plan.run.workload
    if work.text is None:
        return None, None
    windows = perplexity.windows(plan).to(plan.machine.device)
    with ExitStack() as held:
        reference = None
        if distributed.rank() == 0:
            loaded = perplexity.sixteen_bit(plan, session, windows.device, host_memory_available())
            reference = held.enter_context(loaded)
        return perplexity.perplexity(session.model, windows, work.batch_size, progress, reference)


def _limit_gpu_memory(plan: Plan) -> None:
    import torch

    machine = plan.machine
    if machine.gpu_memory_is_capped and machine.gpu_memory_bytes is not None:
        device = distributed.launched_local_rank()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, machine.gpu_memory_bytes / total), device)


def _reset_gpu_peak(plan: Plan) -> None:
    import torch

    if plan.machine.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _gpu_peak(plan: Plan) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if plan.machine.device == "cuda" else 0
