"""`Run + Architecture + Machine → Plan`: choose settings left open, refuse a run that cannot work or does not fit. Pure."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from math import inf

from zi_experiments.config.schema import CacheDevice, ConfigError, InapplicableError, OffloadDevice, Run, Verify
from zi_experiments.cost_model import memory_fit
from zi_experiments.cost_model.plan import Plan, Storage
from zi_experiments.cost_model.prediction import predict
from zi_experiments.cost_model.spec import Spec
from zi_experiments.engines import base
from zi_experiments.models import native
from zi_experiments.models.architecture import Architecture, Parameter
from zi_experiments.planner import alternatives
from zi_experiments.planner.alternatives import Change
from zi_experiments.system.machines import HERE, Machine

MOST_WAYS = 3  # alternatives that a refusal names
WORTHWHILE = 0.97  # of a step's time on the GPU alone: with less to gain, an error of the prediction may cost more
MOST_SEQUENCES = 1 << 20  # upper limit when searching for the largest batch


def build(run: Run, arch: Architecture, machine: Machine) -> Plan:
    """Return the plan of a run. Raises `ConfigError`, with numbers and what to type, when it cannot work or does not fit."""
    plan = _draft(run, arch, machine)
    if problem := memory_fit.problem(plan):
        advice = list(islice(chain(_of_another_machine(plan), _fitting_changes(plan)), MOST_WAYS))
        raise ConfigError(f"{problem}: pass {', or '.join(advice) or _last_resort(plan)}")
    return plan


def on_gpu(run: Run, arch: Architecture, machine: Machine) -> Plan:
    """Return the plan of a run if the GPU computed all layers, whether or not it fits. Raises `ConfigError`."""
    return _draft(_with_share(run, "gpu"), arch, machine)


def _draft(run: Run, arch: Architecture, machine: Machine) -> Plan:
    """Return the plan without checking that it fits. Raises `ConfigError` when it cannot work."""
    base.check(run)
    _check_lengths(run, arch)
    _check_cache(run, arch)
    _check_native(run, arch)
    _check_groups(run, arch)
    if machine.device == "cpu":
        _check_choices(run)
    if run.workload.batch_size == "auto":
        run = _with_largest_batch(run, arch, machine)
    if run.offload.compute == "auto":
        run = _with_best_share(run, arch, machine)
    spec = Spec(run=run, architecture=arch, machine=machine, dtype=choose_dtype(run, arch, machine))
    _check_experts(spec)
    storage = base.get(run.engine.name).storage(spec)
    return Plan(
        run=run,
        architecture=arch,
        machine=machine,
        dtype=spec.dtype,
        storage=storage,
        pin_memory=_pin(spec, storage),
    )


def attempt(run: Run, arch: Architecture, machine: Machine) -> Plan | None:
    """Return the plan of a run; None when it cannot work or does not fit."""
    try:
        plan = _draft(run, arch, machine)
    except ConfigError:
        return None
    return plan if memory_fit.problem(plan) is None else None


def _of_another_machine(plan: Plan) -> Iterator[str]:
    """Yield what to type if the GPU of another machine is planned for, and the host memory of this one is too small."""
    hardware = plan.run.hardware
    if hardware.name not in HERE and hardware.host_memory_gib is None and memory_fit.lacks(plan, "host"):
        yield "hardware.host_memory_gib=… of the machine that you plan for"


def _last_resort(plan: Plan) -> str:
    """Return what to type when no change of a plan fits this machine."""
    larger = "offload.path=… on a larger disk, or " if memory_fit.lacks(plan, "disk") else ""
    return f"{larger}model=… of a smaller one"


def _with_largest_batch(run: Run, arch: Architecture, machine: Machine) -> Run:
    """Return the run with the largest batch that fits, or with one sequence per rank if none fits."""
    return _with_batch(run, max(1, largest_batch(run, arch, machine) // run.hardware.num_gpus) * run.hardware.num_gpus)


def _with_best_share(run: Run, arch: Architecture, machine: Machine) -> Run:
    """Return the run with the share of the host that is fastest by prediction; none if that gains little.

    Unchanged where nobody has measured the host.
    """
    alone = _with_share(run, 0)
    plan, known = attempt(alone, arch, machine), machine.calibration
    if plan is None or machine.device == "cpu":
        return alone
    if known is None:
        return run

    def step_s(share: float) -> float:
        plan = attempt(_with_share(run, share), arch, machine)
        return (plan and predict(plan).decode_step_s) or inf

    if plan.storage.can_compute_experts_on_host:
        host, link = known.host_experts_bytes_per_s, known.link_busy_bytes_per_s
        if not host or not link:
            return run
        best = host / (host + link)  # both end together
    elif known.host_layer_s is not None:
        best = _best_layers(arch.num_layers, step_s) / arch.num_layers
    else:
        return run
    usual_s = predict(plan).decode_step_s
    return _with_share(run, best) if usual_s and step_s(best) < WORTHWHILE * usual_s else alone


def _best_layers(count: int, step_s: Callable[[float], float]) -> int:
    """Return the number of layers on the host with which a step is fastest, of so many.

    With more of them, a step becomes faster as long as the link takes longer, and slower from there on.
    """
    return bisect_left(range(count), True, key=lambda n: step_s((n + 1) / count) >= step_s(n / count))


def _with_share(run: Run, share: float | str) -> Run:
    return replace(run, offload=replace(run.offload, compute=share))


def _with_batch(run: Run, batch_size: int) -> Run:
    return replace(run, workload=replace(run.workload, batch_size=batch_size))


def largest_batch(run: Run, arch: Architecture, machine: Machine) -> int:
    """Return the largest batch of one micro-batch that fits, over all ranks; 0 if not even one sequence per rank does."""
    ranks = run.hardware.num_gpus
    candidates = range(1, MOST_SEQUENCES // ranks)
    most = bisect_left(candidates, True, key=lambda n: not attempt(_with_batch(run, n * ranks), arch, machine))
    return most * ranks


def _longest_prompt(run: Run, arch: Architecture, machine: Machine) -> int:
    """Return the most prompt tokens that fit; 0 if not even one does."""

    def is_too_long(tokens: int) -> bool:
        return not attempt(replace(run, workload=replace(run.workload, prompt_len=tokens)), arch, machine)

    return bisect_left(range(1, run.workload.prompt_len), True, key=is_too_long)


def _fitting_changes(plan: Plan) -> Iterator[str]:
    """Yield additions to the command line with which the run fits: single changes, else pairs, the smallest first."""
    run, arch, machine = plan.run, plan.architecture, plan.machine
    if batch := largest_batch(run, arch, machine):
        yield f"workload.batch_size={batch}"
    near = [*alternatives.with_setting(run, "verify", Verify.off), *alternatives.one(run, machine.gpus_visible)]
    found = [each for each in near if attempt(each.run, arch, machine)]
    yield from (each.text for each in found)
    if batch or found:
        return
    if length := _longest_prompt(_with_batch(run, run.hardware.num_gpus), arch, machine):
        yield f"workload.prompt_len={length} workload.batch_size={run.hardware.num_gpus}"
    for first in near:
        for second in _further(first, plan):
            if attempt(second.run, arch, machine):
                yield f"{first.text} {second.text}"


def _further(first: Change, plan: Plan) -> Iterator[Change]:
    """Yield variants with one more change, including a smaller batch."""
    run, arch, machine = first.run, plan.architecture, plan.machine
    if batch := largest_batch(run, arch, machine):
        yield from alternatives.with_setting(run, "workload.batch_size", batch)
    yield from alternatives.one(run, machine.gpus_visible)


def choose_dtype(run: Run, arch: Architecture, machine: Machine) -> str:
    """Return `dtype` as set, else the configuration's 16-bit type if the device supports it, else the device's best.

    Raises `ConfigError` for a type that is set and that the device does not compute in.
    """
    if run.dtype is not None:
        if run.dtype.value not in machine.dtypes:
            raise ConfigError(
                f"dtype={run.dtype.value} is not a type that {machine.gpu_name or f'the {machine.device} device'} computes "
                f"in: pass dtype={machine.dtypes[0]}, or dtype=null"
            )
        return run.dtype.value
    return arch.dtype if arch.dtype in machine.dtypes else machine.dtypes[0]


def _pin(spec: Spec, storage: Storage) -> bool:
    """Return whether weights in host memory are pinned: as set, else by default if they leave a tenth of it free."""
    offload = spec.run.offload
    if spec.machine.device != "cuda" or offload.device is OffloadDevice.none or not storage.pinnable:
        return False
    if offload.pin_memory is not None:
        return offload.pin_memory
    copies = spec.run.launch.nnodes if storage.each_machine_has_all else 1
    host_bytes = copies * storage.placement.cpu_bytes + storage.host_buffer_bytes
    return storage.pins_by_default and host_bytes < 0.9 * spec.host_memory_bytes


def _check_lengths(run: Run, arch: Architecture) -> None:
    work, longest = run.workload, arch.max_positions
    if longest is not None and longest < 2:
        raise ConfigError(
            f"{run.model.name} has too few positions ({longest}) for a prompt and a token after it: pass model=opt-125m, "
            "or model=local model.path=… of one with more"
        )
    if longest is not None and work.prompt_len + work.gen_len > longest:
        fits = f"workload.prompt_len={longest - work.gen_len}"
        if work.gen_len >= longest:
            fits = f"workload.gen_len={longest // 2} workload.prompt_len={longest - longest // 2}"
        raise ConfigError(
            f"workload.prompt_len={work.prompt_len} and workload.gen_len={work.gen_len} exceed the {longest} positions of "
            f"{run.model.name}: pass {fits} or less"
        )


def _check_cache(run: Run, arch: Architecture) -> None:
    """Raise `ConfigError` for settings that do not work with the model's own cache class."""
    if not arch.has_own_cache:
        return
    own = f"{run.model.name} ({arch.model_type}) has a cache of its own"
    if run.kv_cache.device is CacheDevice.cpu:
        raise ConfigError(f"{own}, which stays on the device: pass kv_cache=gpu")
    if run.workload.micro_batches > 1:
        raise ConfigError(f"{own}, which cannot be split into micro-batches: pass workload.micro_batches=1")


def _check_experts(spec: Spec) -> None:
    """Raise `ConfigError` if the router is to select more experts than there are."""
    experts = max((p.shape[0] for p in spec.architecture.parameters if p.is_experts), default=0)
    if spec.routed_experts > experts > 0:
        name, numbers = spec.run.model.name, "model.architecture." if spec.run.model.architecture else ""
        raise ConfigError(
            f"{name} routes each token to {spec.routed_experts} of {experts} experts: "
            f"pass {numbers}{spec.routed_experts_key}={experts} or less"
        )


def _check_native(run: Run, arch: Architecture) -> None:
    """Raise `InapplicableError` if weights are to stay in a checkpoint's own format, and there is none that is known."""
    if not run.quant.is_native:
        return
    for p in arch.parameters:
        if p.native is not None and (size := p.native.undivided(p.shape)):
            raise ConfigError(
                f"{p.native.format.name} has groups of {p.native.format.group[1]}, which do not divide the {size} inputs of "
                f"{p.name} {list(p.shape)}: pass quant=fp16"
            )
    if any(p.native for p in arch.parameters):
        return
    keeps, name = f"quant=native keeps weights as {native.FORMATS}", run.model.name
    if arch.stored is not None:
        raise InapplicableError(
            f"{keeps}, and {name} is stored as {arch.stored.format}: pass quant=int4, or quant=fp16"
        )
    key = "+model.architecture.quantization_config"
    example = f"{key}={{quant_method:fp8,weight_block_size:[128,128]}}" if run.model.architecture else "quant=fp16"
    raise InapplicableError(
        f"{keeps}, and {name} is published in none of them: pass quant=int4, or {example}, or model=gpt-oss-20b"
    )


def _check_groups(run: Run, arch: Architecture) -> None:
    quant = run.quant
    if quant.is_native or not quant.is_quantized:
        return
    assert quant.bits is not None
    assert quant.group_size is not None
    assert quant.group_dim is not None
    quantizable = [p for p in arch.parameters if p.quantizable]
    dim, bits = quant.group_dim, quant.bits

    def works(group_size: int, group_dim: int) -> bool:
        return all(_can_group(p, bits, group_dim, group_size) for p in quantizable)

    for p in quantizable:
        if not _can_group(p, bits, dim, quant.group_size):
            choices = [f"quant.group_size={size}" for size in (32, 64, 128) if works(size, dim)]
            if not choices and any(works(size, 1 - dim) for size in (32, 64, 128)):
                choices = [f"quant.group_dim={1 - dim}"]
            problem = (
                f"quant.group_size={quant.group_size} does not divide the {p.shape[dim - 2]} {('rows', 'columns')[dim]}"
            )
            if p.shape[dim - 2] % quant.group_size == 0:
                problem = f"quant.bits={quant.bits} does not fill 16-bit elements with the {p.shape[-1]} columns"
            raise ConfigError(f"{problem} of {p.name} {list(p.shape)}: pass {' or '.join(choices or ['quant=fp16'])}")


def _can_group(parameter: Parameter, bits: int, group_dim: int, group_size: int) -> bool:
    """Return whether groups divide each (stacked) matrix, and the packed integers of a row fill whole 16-bit elements."""
    return parameter.shape[group_dim - 2] % group_size == 0 and parameter.shape[-1] % (16 // bits) == 0


def _check_choices(run: Run) -> None:
    if run.offload.use_gds:
        raise ConfigError(
            "offload.use_gds=true needs a CUDA GPU and this run is on the CPU: pass offload.use_gds=false"
        )
    if run.hardware.memory_gib is not None:
        raise ConfigError(
            "hardware.memory_gib is the memory of a GPU and this run is on the CPU: pass hardware.memory_gib=null, "
            f"or hardware.host_memory_gib={run.hardware.memory_gib} for the host's"
        )
