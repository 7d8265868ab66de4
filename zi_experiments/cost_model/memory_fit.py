"""How much of each kind of memory a plan uses, and what does not fit. Pure computation."""

from dataclasses import dataclass

from zi_experiments.config.schema import CacheDevice, Verify
from zi_experiments.cost_model.plan import Plan
from zi_experiments.units import gigabytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """Bytes that a plan uses of one kind of memory: of each GPU, of the host, or of the disk of each machine."""

    where: str  # "GPU", "host" or "disk"
    weights: int
    buffers: int  # for weights that are copied or expanded
    experts: int = 0  # routed experts: on a GPU copies of those in host memory, there copies of those on disk
    kv_cache: int
    workspace: int  # activations and logits
    processes: int  # CUDA context and libraries on a GPU, worker processes on the host
    available: int

    @property
    def total(self) -> int:
        return self.weights + self.buffers + self.experts + self.kv_cache + self.workspace + self.processes


def uses(plan: Plan) -> tuple[Use, ...]:
    """Return the use of GPU memory (if there is a GPU), host memory, and disk (if weights go there), in this order."""
    free, weights = plan.machine.disk_free_bytes, plan.of_one_machine(plan.placement.nvme_bytes)
    if not weights or free is None:
        return _memory(plan)
    nothing = {"buffers": 0, "kv_cache": 0, "workspace": 0, "processes": 0}
    return *_memory(plan), Use(where="disk", weights=weights, available=free, **nothing)


def _memory(plan: Plan) -> tuple[Use, ...]:
    memory, stored, ranks = plan.machine.gpu_memory_bytes, plan.storage, plan.run.hardware.num_gpus
    if memory is None:
        kv_cache, workspace = plan.kv_cache_bytes, ranks * plan.workspace_bytes
        return (_host(plan, copies=stored.copied_bytes, kv_cache=kv_cache, workspace=workspace),)
    in_host = plan.run.kv_cache.device is CacheDevice.cpu
    gpu = Use(
        where="GPU",
        weights=(plan.placement.gpu_bytes + stored.copied_bytes) // ranks,
        buffers=stored.gpu_buffer_bytes - stored.cached_bytes,
        experts=stored.cached_bytes,
        kv_cache=plan.of_one_rank(_kv_on_gpu(plan, in_host)),
        workspace=plan.workspace_bytes,
        processes=plan.context_bytes,
        available=memory,
    )
    return gpu, _host(plan, copies=0, kv_cache=plan.kv_cache_bytes if in_host else stored.host_kv_bytes, workspace=0)


def _kv_on_gpu(plan: Plan, in_host: bool) -> int:
    """Return the bytes of KV cache on the GPUs: keys and values for the host pass through room for two layers."""
    hosted = plan.storage.host_kv_bytes
    return (0 if in_host else plan.kv_cache_bytes - hosted) + (plan.kv_slot_bytes if in_host or hosted else 0)


def _host(plan: Plan, *, copies: int, kv_cache: int, workspace: int) -> Use:
    machines, stored = plan.run.launch.nnodes, plan.storage
    return Use(
        where="host",
        weights=plan.of_one_machine(plan.placement.cpu_bytes) + copies // machines,
        buffers=(stored.host_buffer_bytes - stored.host_cached_bytes) // machines,
        experts=stored.host_cached_bytes // machines,
        kv_cache=kv_cache // machines,
        workspace=workspace // machines,
        processes=plan.process_bytes // machines,
        available=plan.machine.host_memory_bytes,
    )


def problem(plan: Plan) -> str | None:
    """Return what does not fit, with the numbers; None if everything fits."""
    for use in uses(plan):
        if use.total > use.available:
            return f"{plan.run.model.name} needs {_described(use)}"
    return _verification_problem(plan) if plan.run.verify is Verify.on else None


def lacks(plan: Plan, where: str) -> bool:
    """Return whether the GPU, host memory or the disk (`Use.where`) is too small for the plan, by itself."""
    return any(use.where == where and use.total > use.available for use in uses(plan))


def _verification_problem(plan: Plan) -> str | None:
    """Return what does not fit while the verification reference runs, which is before the measured passes."""
    use, parked = uses(plan)[0], plan.storage.parked_bytes
    beside = use.weights - parked + use.buffers + use.processes
    if use.where == "host":
        beside += use.experts  # those on a GPU are given up
    if beside + plan.reference_bytes > use.available:
        return (
            f"verification needs {gigabytes(plan.reference_bytes, 1)} for one layer, embeddings and head in 16 bits, beside "
            f"{gigabytes(beside, 1)}, and there are {gigabytes(use.available, 1)}"
        )
    host = next(each for each in uses(plan) if each.where == "host")
    parked *= plan.run.hardware.num_gpus // plan.run.launch.nnodes
    if host.total + parked > host.available:
        return (
            f"verification moves {gigabytes(parked, 1)} of the GPU's weights to host memory for a while, beside "
            f"{gigabytes(host.total, 1)}, and there are {gigabytes(host.available, 1)}"
        )
    return None


def _described(use: Use) -> str:
    """Return the total and its parts, largest first, and the available amount, in words."""
    named = {
        "weights": use.weights,
        "buffers": use.buffers,
        "pool of experts" if use.where == "GPU" else "cache of experts": use.experts,
        "KV cache": use.kv_cache,
        "activations": use.workspace,
        "CUDA" if use.where == "GPU" else "processes": use.processes,
    }
    largest = sorted((amount, name) for name, amount in named.items() if amount >= 0.01 * use.total)[::-1]
    parts = ", ".join(f"{gigabytes(amount, 1)} {name}" for amount, name in largest)
    if use.where == "disk":
        return f"{gigabytes(use.total, 1)} on disk and {gigabytes(use.available, 1)} are free there"
    if use.where == "GPU":
        return f"{gigabytes(use.total, 1)} on each GPU ({parts}) and each has {gigabytes(use.available, 1)}"
    return f"{gigabytes(use.total, 1)} of host memory ({parts}) and {gigabytes(use.available, 1)} are available"
