"""DeepSpeed ZeRO-Inference: ZeRO stage 3 with parameters on the GPU, in host memory or on disk, quantized or not."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from zi_experiments.config.schema import ConfigError, InapplicableError, Run
from zi_experiments.cost_model.inventory import Stored
from zi_experiments.cost_model.plan import Plan, Storage
from zi_experiments.cost_model.spec import Spec
from zi_experiments.engines.deepspeed import ds_config, operators, patches, placement, quantized
from zi_experiments.engines.deepspeed.checked_writes import checking_writes
from zi_experiments.engines.deepspeed.partitions import inventory
from zi_experiments.engines.deepspeed.pinned import register_swap_buffers
from zi_experiments.engines.deepspeed.prerequisites import problems
from zi_experiments.engines.disk_access import MOST_IN_FLIGHT, check_one_folder, reading
from zi_experiments.engines.hf_session import HFSession, host_cache
from zi_experiments.models import weights
from zi_experiments.models.causal_lm import model_class
from zi_experiments.runtime import distributed
from zi_experiments.runtime.progress import Progress
from zi_experiments.system.disk import Disk

OPTIONS = frozenset(
    {
        "engine.profile",
        "offload.buffer_count",
        "offload.buffer_size",
        "offload.use_gds",
        "offload.aio.block_size",
        "offload.aio.queue_depth",
        "offload.aio.intra_op_parallelism",
        "offload.aio.single_submit",
        "offload.aio.overlap_events",
    }
)
CONFIG_NAME = "ds_config"


def check(run: Run) -> None:
    """Raise `ConfigError` for no profile, several folders, unequal batches, or weights in a checkpoint's own format."""
    if run.quant.is_native:
        raise InapplicableError("engine=deepspeed has no quant=native: pass quant=int4, or engine=stream")
    if run.engine.profile is None:
        raise ConfigError(
            "engine.profile=null is not a profile of engine=deepspeed: pass engine.profile=tuned, or reference"
        )
    check_one_folder(run)
    ranks, sequences = run.hardware.num_gpus, run.workload.batch_size
    if sequences != "auto" and sequences % ranks:
        raise ConfigError(
            f"workload.batch_size={sequences} cannot be divided among {ranks} ranks, as engine=deepspeed has to: "
            f"pass workload.batch_size={sequences // ranks * ranks}, or engine=stream"
        )


def storage(spec: Spec) -> Storage:
    """Return where ZeRO stage 3 keeps the weights."""
    return placement.storage(spec)


def requirements(plan: Plan) -> Iterator[str]:
    """Yield what DeepSpeed's operators and its asynchronous I/O lack on this machine."""
    return problems(plan)


def disk_access(run: Run, folders: Sequence[Path]) -> Disk:
    """Return how a run reads from `folders`: one queue per thread."""
    aio = run.offload.aio  # the defaults of both profiles exceed MOST_IN_FLIGHT
    in_flight = (aio.intra_op_parallelism or MOST_IN_FLIGHT) * (aio.queue_depth or MOST_IN_FLIGHT)
    return reading(folders, aio.block_size, in_flight)


def stored(plan: Plan) -> dict[str, Stored]:
    """Return how ZeRO stage 3 stores each parameter, by name."""
    return placement.stored(plan)


def config(plan: Plan, scratch: Sequence[str]) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a plan; `scratch` has the run's own folder on the NVMe path."""
    return ds_config.build(plan, scratch[0] if scratch else None)


def prepare(plan: Plan, progress: Progress) -> None:
    """Compile the operators of this run, then start the distributed back end, which needs one of them on a CPU."""
    operators.build(operators.operators(plan), progress)
    distributed.init(plan.machine.device)
    import deepspeed

    deepspeed.init_distributed(auto_mpi_discovery=False)


def load(plan: Plan, config: dict[str, Any], progress: Progress) -> HFSession:
    """Load the planned model into partitioned, offloaded and quantized storage, one parameter at a time.

    Call `prepare` before. The order is the reference script's: configuration, weights, `deepspeed.initialize`.
    """
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    hf_config = HfDeepSpeedConfig(config)
    get_accelerator().empty_cache()
    progress.begin("load", plan.weight_bytes, "bytes")
    pinning = patches.pinning_exactly() if plan.pin_memory else nullcontext()
    with (
        torch.no_grad(),
        patches.keeping_arange(),
        patches.not_quantizing(),
        patches.quiet_transformers(),
        checking_writes(),
        pinning,
    ):
        model = _filled(plan, progress)
        if plan.pin_memory:
            register_swap_buffers(model)
    quantized.expand_in_forward(model)
    engine = deepspeed.initialize(model=model.eval(), config=config)[0]
    engine.module.eval()
    progress.end()
    # transformers has only a weak reference to it: without this one it would forget that ZeRO-3 is on
    engine.module.hf_deepspeed_config = hf_config
    return HFSession(
        engine.module,
        engine.device,
        host_cache(plan, engine.device),
        inventory=partial(inventory, engine.module, engine.device),
        close=engine.destroy,
    )


def _filled(plan: Plan, progress: Progress) -> Any:
    """Return the model as from an empty checkpoint, each parameter filled and quantized before it is partitioned."""
    config, quantize = plan.architecture.config, _quantizer(plan)
    with closing(weights.of(plan.run.weights, config, _dtype(plan))) as source:

        def prepare(name: str, parameter: Any) -> None:
            with patches.plain_constructors():
                source.fill(name, parameter.data)
            quantize(name, parameter)
            # transformers would otherwise gather every parameter to initialise it again, into packed INT4 bytes too
            parameter._is_hf_initialized = True
            progress.advance(_bytes(parameter))

        with patches.partitioning_at_the_end(model_class(config), prepare):
            model = model_class(config).from_pretrained(None, config=config, state_dict={}, dtype=_dtype(plan))
        weights.fill_buffers(model, source)
        return model


def _quantizer(plan: Plan) -> Callable[[str, Any], None]:
    """Return a function that packs a parameter if the plan quantizes it."""
    chosen = {p.name for p in plan.architecture.parameters if plan.is_quantized(p)}

    def quantize(name: str, parameter: Any) -> None:
        if name in chosen:
            quantized.quantize(parameter, plan.run.quant)

    return quantize


def _bytes(parameter: Any) -> int:
    return int(parameter.numel() * parameter.element_size())


def _dtype(plan: Plan) -> Any:
    import torch

    return getattr(torch, plan.dtype)
