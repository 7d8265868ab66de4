"""DeepSpeed ZeRO-Inference: ZeRO stage 3 with parameters on the GPU, in host memory or on disk, quantized or not."""

from contextlib import nullcontext
from typing import Any

from zi_experiments import distributed, ds_config
from zi_experiments.architecture import model_class
from zi_experiments.config import CacheDevice, WeightSource
from zi_experiments.engines.deepspeed import patches
from zi_experiments.engines.deepspeed.ops import build_ops
from zi_experiments.engines.deepspeed.pinned import register_swap_buffers
from zi_experiments.plan import Plan
from zi_experiments.progress import Progress
from zi_experiments.weights import RandomWeights


class DeepSpeedSession:
    """A model wrapped by a DeepSpeed engine."""

    def __init__(self, engine: Any, hf_config: Any, plan: Plan) -> None:
        self._engine = engine
        self.model = engine.module
        # transformers holds it by a weak reference: without this one it would forget that ZeRO-3 is on
        self.model.hf_deepspeed_config = hf_config
        on_host = plan.run.kv_cache.device is CacheDevice.cpu and plan.machine.device == "cuda"
        self._cache = "offloaded" if on_host else None

    def generate(self, input_ids: Any, gen_len: int, streamer: Any = None) -> Any:
        import torch

        ids = input_ids.to(self._engine.device)
        with torch.inference_mode():
            return self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=gen_len,
                max_new_tokens=gen_len,
                do_sample=False,
                cache_implementation=self._cache,
                streamer=streamer,
            )

    def close(self) -> None:
        self._engine.destroy()


def config(plan: Plan, scratch: str | None) -> dict[str, Any]:
    """DeepSpeed's configuration of a plan; `scratch` is the run's own folder on the NVMe path."""
    return ds_config.build(plan, scratch)


def prepare(plan: Plan, progress: Progress) -> None:
    """Compile the operators of this run, then start the distributed back end, which uses one of them on a CPU."""
    build_ops(plan, progress)
    distributed.init(plan.machine.device)


def load(plan: Plan, config: dict[str, Any], progress: Progress) -> DeepSpeedSession:
    """Load the planned model into partitioned, offloaded and quantized storage, one parameter at a time.

    Needs `prepare`. From there the order is the reference script's: configuration, weights, `deepspeed.initialize`.
    """
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    hf_config = HfDeepSpeedConfig(config)
    get_accelerator().empty_cache()
    progress.begin("load", plan.weight_bytes, "bytes")
    pinning = patches.pinning_exactly() if plan.pin_memory else nullcontext()
    with torch.no_grad(), patches.keeping_arange(), pinning:
        model = _from_checkpoint(plan, progress) if _is_pretrained(plan) else _from_nothing(plan, progress)
        if plan.pin_memory:
            register_swap_buffers(model)
    engine = deepspeed.initialize(model=model.eval(), config=config)[0]
    engine.module.eval()
    progress.end()
    return DeepSpeedSession(engine, hf_config, plan)


def _is_pretrained(plan: Plan) -> bool:
    return plan.run.weights.source is WeightSource.pretrained


def _from_nothing(plan: Plan, progress: Progress) -> Any:
    """The model with random weights: an empty checkpoint, and parameters filled as they are made."""
    weights = RandomWeights(plan.run.weights.seed)
    config = plan.architecture.config

    def fill(name: str, parameter: Any) -> None:
        weights.fill(name, parameter)
        # transformers would otherwise gather every parameter to initialise it again, into packed INT4 bytes too
        parameter._is_hf_initialized = True

    with patches.filling(fill), patches.counting_partitions(progress), patches.quiet_transformers():
        return model_class(config).from_pretrained(None, config=config, state_dict={}, dtype=_dtype(plan))


def _from_checkpoint(plan: Plan, progress: Progress) -> Any:
    """The model with the weights of a checkpoint, each converted to the run's dtype before it is quantized."""
    from pathlib import Path

    path = plan.run.weights.path
    assert path is not None
    folder = Path(path).expanduser()
    quantized = plan.run.quant.bits < 16
    with (
        patches.quantizing_in(_dtype(plan)) if quantized else nullcontext(),
        patches.counting_loads(plan, progress),
        patches.quiet_transformers(),
    ):
        model, report = model_class(plan.architecture.config).from_pretrained(
            str(folder) if folder.is_dir() else path,
            config=plan.architecture.config,
            dtype=_dtype(plan),
            output_loading_info=True,
        )
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    if missing := sorted(set(report["missing_keys"]) - tied):
        raise ValueError(
            f"{path} has no weights for {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''} "
            f"({len(missing)} of the model's parameters): the checkpoint is incomplete or of another model"
        )
    return model


def _dtype(plan: Plan) -> Any:
    import torch

    return getattr(torch, plan.dtype)
