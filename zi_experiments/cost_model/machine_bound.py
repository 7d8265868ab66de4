"""The least time of a decode step over all placements that a machine allows. Pure; docs/limits.md derives it."""

from math import inf

from zi_experiments.cost_model.bound import prefill_flops, rate, step_bytes, step_flops
from zi_experiments.cost_model.plan import Plan
from zi_experiments.cost_model.spec import ELEMENT_BYTES


def machine_bound_s(plan: Plan) -> float | None:
    """Return seconds that no placement of the plan's weights and KV cache can beat in a decode step on its machine.

    None where a rate is unknown. Any share of the bytes may be in the GPUs' memory, cross the links, or be read by the
    host's cores, all at once; links and cores share the host's memory. What the cores compute is bounded by the bytes that
    they read, and they compute at most as fast as the GPUs. Bytes that fit neither on the GPUs nor in the host's memory
    come from the disk.
    """
    on_gpu = plan.machine.device == "cuda"
    room, beyond = _room(plan)
    hbm, flops, disk = rate(plan, "hbm"), rate(plan, "gemm"), rate(plan, "disk")
    cores, shared = _host_rates(plan) if on_gpu else (0.0, 0.0)
    if room is None or not hbm or not flops or cores is None or shared is None or (beyond and not disk):
        return None
    held = step_bytes(plan) - beyond
    by_cores = min(flops, _most_flops_per_byte(plan) * cores)
    seconds = [held / (hbm + shared), step_flops(plan) / (flops + by_cores)]
    if on_gpu:
        seconds.append((held - room) / shared)
    if beyond and disk:
        seconds.append(beyond / disk)
    return max(seconds)


def machine_prefill_s(plan: Plan) -> float | None:
    """Return the same of the prefill: by arithmetic alone, of GPUs and of cores that are as fast."""
    flops = rate(plan, "gemm")
    return flops and prefill_flops(plan) / (2 * flops if plan.machine.device == "cuda" else flops)


def _room(plan: Plan) -> tuple[float | None, float]:
    """Return the bytes of memory of the devices, None if unknown, and how many of a step's bytes no memory has room for."""
    machine, machines = plan.machine, plan.run.launch.nnodes
    host = machine.host_memory_bytes * machines
    if machine.device == "cpu":
        return inf, max(0, step_bytes(plan) - host)
    if machine.gpu_memory_bytes is None:
        return None, 0
    room = machine.gpu_memory_bytes * plan.run.hardware.num_gpus
    return room, max(0, step_bytes(plan) - room - host)


def _host_rates(plan: Plan) -> tuple[float, float] | tuple[None, None]:
    """Return bytes per second that the host's cores read, and that cores and links read together; None if unknown.

    Cores are taken to read as fast as the memory can where nobody has measured them.
    """
    together, cores, link = rate(plan, "memory"), rate(plan, "host"), rate(plan, "link")
    cores = cores or together
    if not cores or not link:
        return None, None
    return cores, max(cores, link, min(link + cores, together or inf))


def _most_flops_per_byte(plan: Plan) -> float:
    """Return the most operations of a step for a byte of a weight: all sequences meet it."""
    layers = (p for p in plan.architecture.parameters if p.layer is not None)
    most = max(p.numel / (ELEMENT_BYTES * plan.stored_numel(p)) for p in layers)
    return 2 * plan.run.workload.sequences * most
