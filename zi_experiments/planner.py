"""`Run + Architecture + Machine → Plan`: chooses what the user left open, and refuses what cannot work or fit. Pure."""

from dataclasses import replace

from zi_experiments import architecture, engines, hardware
from zi_experiments.architecture import Architecture, Parameter
from zi_experiments.config import CacheDevice, ConfigError, OffloadDevice, Profile, Run, Verify
from zi_experiments.hardware import Machine
from zi_experiments.plan import Plan


def plan_run(run: Run) -> Plan:
    """`build` for a run's own model on this machine."""
    return build(run, architecture.load(run), hardware.detect(run.hardware))


def build(run: Run, arch: Architecture, machine: Machine) -> Plan:
    """The plan of a run. Raises `ConfigError`, with numbers and a way out, when it cannot work or fit."""
    _check_lengths(run, arch)
    _check_groups(run, arch)
    dtype = choose_dtype(arch, machine)
    plan = Plan(run=run, architecture=arch, machine=machine, dtype=dtype)
    if machine.device == "cpu":
        _check_choices(run)
    plan = replace(plan, stored=engines.get(run.engine.name).storage(plan))
    _check_host(plan)
    if machine.gpu_memory_bytes is not None:
        _check_gpu(plan, machine.gpu_memory_bytes)
    return replace(plan, pin_memory=_pin(plan))


def choose_dtype(arch: Architecture, machine: Machine) -> str:
    """The configuration's 16-bit type where the device computes it, else the device's best."""
    return arch.dtype if arch.dtype in machine.dtypes else machine.dtypes[0]


def _pin(plan: Plan) -> bool:
    """Whether weights in host memory are pinned: as asked, or (tuned) when they leave a tenth of it free."""
    offload = plan.run.offload
    if plan.machine.device != "cuda" or offload.device is OffloadDevice.none or not plan.storage.pinnable:
        return False
    if offload.pin_memory is not None:
        return offload.pin_memory
    if plan.run.engine.profile is Profile.reference:
        return False
    return plan.placement.cpu_bytes + plan.storage.host_buffer_bytes < 0.9 * plan.machine.host_memory_bytes


def _check_lengths(run: Run, arch: Architecture) -> None:
    work, longest = run.workload, arch.max_positions
    if longest is not None and work.prompt_len + work.gen_len > longest:
        fits = f"workload.prompt_len={longest - work.gen_len}"
        if work.gen_len >= longest:
            fits = f"workload.gen_len={max(1, longest // 2)} workload.prompt_len={longest - longest // 2 - 1}"
        raise ConfigError(
            f"workload.prompt_len={work.prompt_len} and workload.gen_len={work.gen_len} exceed the {longest} positions of "
            f"{run.model.name}: pass {fits} or less"
        )


def _check_groups(run: Run, arch: Architecture) -> None:
    quant = run.quant
    if quant.bits == 16:
        return
    assert quant.group_size is not None
    assert quant.group_dim is not None
    quantizable = [p for p in arch.parameters if p.quantizable]
    dim = quant.group_dim

    def works(group_size: int, group_dim: int) -> bool:
        return all(_can_group(p, quant.bits, group_dim, group_size) for p in quantizable)

    for p in quantizable:
        if not _can_group(p, quant.bits, dim, quant.group_size):
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
    """Whether groups divide a matrix, or each of the matrices stacked in it, and integers fill 16-bit elements in a row."""
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


def _check_host(plan: Plan) -> None:
    run, machine, placement = plan.run, plan.machine, plan.placement
    weights = placement.cpu_bytes + plan.storage.host_buffer_bytes
    if weights > machine.host_memory_bytes:
        ways = [] if run.offload.device is OffloadDevice.nvme else ["offload=nvme"]
        ways += [] if run.quant.bits == 4 else ["quant=int4"]
        raise ConfigError(
            f"{run.model.name} needs {_gb(weights)} of host memory and {_gb(machine.host_memory_bytes)} are available: "
            f"pass {' or '.join(ways or ['model=… of a smaller one'])}"
        )
    kv = plan.kv_cache_bytes if machine.device == "cpu" or run.kv_cache.device is CacheDevice.cpu else 0
    if weights + kv > machine.host_memory_bytes:
        room = machine.host_memory_bytes - weights
        raise ConfigError(
            f"keys and values of {run.workload.sequences} sequences take {_gb(kv)} of host memory, beside {_gb(weights)} "
            f"of weights, and {_gb(machine.host_memory_bytes)} are available: pass {_smaller_batch(plan, kv, room)}"
        )
    if machine.device == "cpu":
        _check_verification(plan, weights, machine.host_memory_bytes)


def _check_gpu(plan: Plan, memory: int) -> None:
    run, placement, ranks = plan.run, plan.placement, plan.run.hardware.num_gpus
    on_gpu = run.kv_cache.device is CacheDevice.gpu
    kv = (plan.kv_cache_bytes if on_gpu else plan.kv_slot_bytes) // ranks
    live = plan.storage.gpu_buffer_bytes
    weights = placement.gpu_bytes // ranks
    if weights + live > memory:
        ways = ["offload=cpu"] if run.offload.device is OffloadDevice.none else ["a larger hardware.memory_gib"]
        ways += [] if run.quant.bits == 4 else ["quant=int4"]
        raise ConfigError(
            f"{run.model.name} needs {_gb(weights + live)} on each GPU for weights and each has {_gb(memory)}: "
            f"pass {' or '.join(ways)}"
        )
    if weights + live + kv > memory:
        room = memory - weights - live
        way_out = _smaller_batch(plan, kv, room) + (", or kv_cache=cpu" if on_gpu else "")
        raise ConfigError(
            f"keys and values of {run.workload.sequences} sequences take {_gb(kv)} on each GPU, beside {_gb(weights + live)} "
            f"of weights, and each has {_gb(memory)}: pass {way_out}"
        )
    _check_verification(plan, weights + live, memory)


def _check_verification(plan: Plan, weights: int, memory: int) -> None:
    if plan.run.verify is Verify.on and weights + plan.reference_bytes > memory:
        raise ConfigError(
            f"verification needs {_gb(plan.reference_bytes)} for one layer, embeddings and head in 16 bits, beside "
            f"{_gb(weights)} of weights, and there are {_gb(memory)}: pass verify=off"
        )


def _smaller_batch(plan: Plan, kv_bytes: int, room_bytes: int) -> str:
    """What to type so that keys and values fit: fewer sequences, or shorter ones when one is too long."""
    work, ranks = plan.run.workload, plan.run.hardware.num_gpus
    batch = work.batch_size * room_bytes // kv_bytes // ranks * ranks
    if batch:
        return f"workload.batch_size={batch}"
    tokens = work.sequences * (work.prompt_len + work.gen_len) * room_bytes // kv_bytes // ranks
    fewer = f"workload.prompt_len={max(1, tokens - work.gen_len)} workload.batch_size={ranks}"
    return fewer + (" workload.micro_batches=1" if work.micro_batches > 1 else "")


def _gb(amount: int) -> str:
    return f"{amount / 1e9:.1f} GB"
