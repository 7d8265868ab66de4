"""`Plan → DeepSpeed's configuration`. The only module that knows DeepSpeed's keys; it does not import DeepSpeed."""

from typing import Any

from zi_experiments.config.schema import OffloadDevice, Profile
from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines.deepspeed import placement


def build(plan: Plan, nvme_path: str | None = None) -> dict[str, Any]:
    """Return the ds_config of a plan. `nvme_path` is the run's own folder on the disk, required with `offload=nvme`.

    `engine.profile=reference` gives the dictionary of the DeepSpeedExamples ZeRO-Inference script, key for key;
    `tuned` gives the one that keeps PCIe busy.
    """
    run = plan.run
    reference = run.engine.profile is Profile.reference
    config: dict[str, Any] = {
        "fp16": {"enabled": plan.dtype == "float16"},
        "bf16": {"enabled": plan.dtype == "bfloat16"},
        "zero_optimization": {"stage": 3, **(_reference_zero(plan) if reference else _tuned_zero(plan))},
        "steps_per_print": 2000,
        "train_batch_size": run.workload.batch_size,
        "wall_clock_breakdown": False,
    }
    if run.quant.is_quantized:
        config["weight_quantization"] = {
            "quantized_initialization": {
                "num_bits": run.quant.bits,
                "group_size": run.quant.group_size,
                "group_dim": run.quant.group_dim,
                "symmetric": False,
            }
        }
    if run.offload.device is OffloadDevice.cpu:
        config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": plan.pin_memory}
    elif run.offload.device is OffloadDevice.nvme:
        assert nvme_path is not None
        config["zero_optimization"]["offload_param"] = {
            "device": "nvme",
            "pin_memory": plan.pin_memory,
            "nvme_path": nvme_path,
            "buffer_count": placement.buffer_count(plan),
            "buffer_size": placement.buffer_numel(plan),
        }
        config["aio"] = _aio(plan, reference)
    return config


def _reference_zero(plan: Plan) -> dict[str, Any]:
    hidden = plan.architecture.hidden_size
    return {
        "stage3_prefetch_bucket_size": 2 * hidden * hidden,
        "stage3_param_persistence_threshold": placement.persistence_numel(plan),
        "stage3_max_live_parameters": 2 * hidden * hidden,
    }


def _tuned_zero(plan: Plan) -> dict[str, Any]:
    return {
        # one hook, one fetch and one wait per decoder layer instead of per submodule
        "leaf_module": {"classes": list(plan.architecture.layer_classes)},
        # a bucket smaller than a layer leaves part of the next layer to be fetched on demand
        "stage3_prefetch_bucket_size": plan.layer_numel,
        "stage3_param_persistence_threshold": placement.persistence_numel(plan),
        # plain F.linear, so that results are equal to those of transformers bit for bit
        "memory_efficient_linear": False,
        # a tied embedding stays live for the whole pass: without room for it nothing would be prefetched
        "stage3_max_live_parameters": placement.live_layers(plan) * plan.layer_numel + plan.outside_numel,
    }


def _aio(plan: Plan, reference: bool) -> dict[str, Any]:
    aio = plan.run.offload.aio
    # DeepSpeed reads intra_op_parallelism, and silently ignores the reference's thread_count
    threads = {"thread_count": 8} if reference else {"intra_op_parallelism": 8}
    if aio.intra_op_parallelism is not None:
        threads = {"intra_op_parallelism": aio.intra_op_parallelism}
    return {
        "block_size": placement.swap_block_bytes(plan),
        "queue_depth": 64 if aio.queue_depth is None else aio.queue_depth,
        **threads,
        "use_gds": plan.run.offload.use_gds,
        "single_submit": False if aio.single_submit is None else aio.single_submit,
        "overlap_events": True if aio.overlap_events is None else aio.overlap_events,
    }
