"""What DeepSpeed needs from a machine, checked before loading: DeepSpeed would fail late, or with a vague message."""

from collections import Counter
from collections.abc import Iterator
from math import ceil

from zi_experiments.config.schema import OffloadDevice, Profile
from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines.deepspeed import ds_config, placement
from zi_experiments.engines.deepspeed.operators import operators
from zi_experiments.system import toolchain
from zi_experiments.system.machines import cpu_dtypes
from zi_experiments.units import gigabytes


def problems(plan: Plan) -> Iterator[str]:
    """Yield one line for each thing that this machine lacks; the line says what to type."""
    yield from _dtype(plan)
    yield from _operators(plan)
    if plan.run.offload.device is OffloadDevice.nvme:
        yield from _swapper(plan)


def _dtype(plan: Plan) -> Iterator[str]:
    """Check the dtype on a CPU: DeepSpeed asks the processor, other engines let torch compute float16 as it can."""
    if plan.machine.device == "cpu" and plan.dtype not in cpu_dtypes():
        yield (
            f"hardware.dtypes=[{plan.dtype}] is a type that DeepSpeed does not support on this processor: "
            f"pass hardware.dtypes=null, which takes {cpu_dtypes()[0]} here, or engine=stream"
        )


def _operators(plan: Plan) -> Iterator[str]:
    """Check the tools that compile DeepSpeed's operators; operators that are compiled already need them too."""
    names = operators(plan)
    if not names:
        return
    tools = [toolchain.cxx_compiler(), toolchain.python_headers(), toolchain.ninja()]
    if plan.machine.device == "cuda":
        tools += [toolchain.cuda_arch_list(), toolchain.cuda_toolkit()]
    listed = ", ".join(name.removesuffix("Builder") for name in names)
    for problem in toolchain.lacking(f"DeepSpeed compiles operators for this run ({listed})", *tools):
        yield f"{problem}; or pass engine=stream"
    if plan.run.offload.device is OffloadDevice.nvme:
        yield from toolchain.lacking("offload=nvme needs libaio's headers", toolchain.libaio())


def _swapper(plan: Plan) -> Iterator[str]:
    """Check what DeepSpeed needs to move weights between disk and memory."""
    locked = plan.storage.locked_bytes // plan.run.hardware.num_gpus
    yield from toolchain.lacking(
        f"offload=nvme locks {gigabytes(locked, 1)} of memory", toolchain.locked_memory(locked)
    )
    yield from _buffers(plan)
    yield from _asynchronous_io(plan)


def _buffers(plan: Plan) -> Iterator[str]:
    """Check size and number of the buffers. A weight in flight takes a buffer, and keeps it while it is on the GPU.

    `tuned` fetches a layer at once, and a tied embedding stays for the head. `reference` fetches a module at a time,
    and only modules of stacked experts have several weights on disk.
    """
    swapped, tuned = placement.swapped(plan), plan.run.engine.profile is Profile.tuned
    largest = max((ceil(plan.stored_numel(p) / plan.run.hardware.num_gpus) for p in swapped), default=0)
    if (size := placement.buffer_numel(plan)) < largest:
        yield (
            f"offload.buffer_size={size} and the largest weight on disk has {largest} elements as stored: "
            f"pass offload.buffer_size={largest}"
        )
    together = Counter(p.layer for p in swapped if p.layer is not None and (tuned or p.is_experts))
    vocabulary = plan.architecture.config.get_text_config().vocab_size
    tables = [p for p in swapped if p.layer is None and p.shape[0] == vocabulary]
    stays = tuned and len(tables) == 1  # the embedding is the head too
    needed = max(together.values(), default=1) + (1 if stays else 0)
    if (count := placement.buffer_count(plan)) < needed:
        yield (
            f"offload.buffer_count={count} and {needed} weights are in use at a time: pass offload.buffer_count={needed}"
        )


def _asynchronous_io(plan: Plan) -> Iterator[str]:
    aio = ds_config.build(plan, "")["aio"]
    depth, most = aio["queue_depth"], ((1 << 31) - 1) // aio["block_size"]
    if depth > most and not aio["overlap_events"]:
        yield (
            f"offload.aio.queue_depth={depth} blocks of {aio['block_size']} bytes are 2 GiB or more, which overflows in "
            f"DeepSpeed with offload.aio.overlap_events=false: pass offload.aio.queue_depth={most}"
        )
    needed, left = aio_requests(plan, depth), toolchain.aio_requests_left()
    finding = toolchain.aio_requests(needed)
    if finding.fix is not None and left is not None:
        fits = left // aio_requests(plan, 1)
        smaller = f"pass offload.aio.queue_depth={fits}, or " if fits else ""
        yield f"offload.aio.queue_depth={depth} takes {needed} requests and {finding.found}: {smaller}{finding.fix}"


def aio_requests(plan: Plan, queue_depth: int) -> int:
    """Return how many asynchronous I/O requests DeepSpeed reserves (its io_setup of this depth), over a machine's ranks.

    Two handles, to read and to write, each reserve them for the calling thread and for their own threads. There is one
    own thread with GPUDirect Storage. Source: measured in /proc/sys/fs/aio-nr.
    """
    aio = ds_config.build(plan, "")["aio"]
    threads = 1 if aio["use_gds"] else aio.get("intra_op_parallelism", 1)
    return 2 * (1 + threads) * queue_depth * plan.run.hardware.num_gpus // plan.run.launch.nnodes
