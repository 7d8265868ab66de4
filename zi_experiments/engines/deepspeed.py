"""DeepSpeed ZeRO-Inference: ZeRO stage 3 with parameters on the GPU, in host memory or on disk, quantized or not."""

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from zi_experiments import distributed, ds_config
from zi_experiments.architecture import model_class
from zi_experiments.config import OffloadDevice, WeightSource
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
        self._cache = "offloaded" if plan.run.kv_cache.device.value == "cpu" and plan.machine.device == "cuda" else None

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
    _build_ops(plan, progress)
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
    with torch.no_grad(), _pinning_exactly() if plan.pin_memory else nullcontext():
        model = _from_checkpoint(plan, progress) if _is_pretrained(plan) else _from_nothing(plan, progress)
        if plan.pin_memory:
            _register_swap_buffers(model)
    engine = deepspeed.initialize(model=model.eval(), config=config)[0]
    engine.module.eval()
    progress.end()
    return DeepSpeedSession(engine, hf_config, plan)


def _build_ops(plan: Plan, progress: Progress) -> None:
    """Compile the DeepSpeed operators that this run uses; otherwise the first forward pass would, and be timed."""
    from pathlib import Path

    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    names = []
    if plan.machine.device == "cpu":
        names.append("ShareMemCommBuilder")
    if plan.run.offload.device is OffloadDevice.nvme:
        names.append("GDSBuilder" if plan.run.offload.use_gds else "AsyncIOBuilder")
    quant = plan.run.quant
    if quant.bits < 16 and plan.dtype == "float16" and plan.machine.device == "cuda":
        names.append("QuantizerBuilder")
    for name in names:
        builder = get_accelerator().create_op_builder(name)
        if not any(Path(_get_build_directory(builder.name, verbose=False)).glob("*.so")):
            progress.begin(f"build {builder.name}", 1, "operator, first use: about a minute")
        builder.load(verbose=False)
        progress.end()


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

    with _filling(fill), _counting_partitions(progress), _quiet_transformers():
        return model_class(config).from_pretrained(None, config=config, state_dict={}, dtype=_dtype(plan))


def _from_checkpoint(plan: Plan, progress: Progress) -> Any:
    """The model with the weights of a checkpoint, each converted to the run's dtype before it is quantized."""
    from pathlib import Path

    path = plan.run.weights.path
    assert path is not None
    folder = Path(path).expanduser()
    quantized = plan.run.quant.bits < 16
    with (
        _quantizing_in(_dtype(plan)) if quantized else nullcontext(),
        _counting_loads(plan, progress),
        _quiet_transformers(),
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


@contextmanager
def _replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute of a class by a wrapper of it for a while."""
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _filling(fill: Callable[[str, Any], None]) -> Any:
    """Give each new parameter its value before zero.Init quantizes and partitions it."""
    from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param

    def wrap(original: Any) -> Any:
        def post_init(self: Any, module: Any) -> None:
            for name, parameter in module.named_parameters(recurse=False):
                if not is_zero_param(parameter):
                    parameter.data = parameter.data.to(self.local_device, self.dtype)
                    fill(name, parameter)
            original(self, module)

        return post_init

    return _replaced(Init, "_post_init_method", wrap)


def _counting_partitions(progress: Progress) -> Any:
    """Advance the progress by each parameter that reaches its storage."""
    from deepspeed.runtime.zero.partition_parameters import Init

    def wrap(original: Any) -> Any:
        def zero_init_param(self: Any, parameter: Any) -> None:
            stored = parameter.numel() * parameter.element_size()
            original(self, parameter)
            progress.advance(stored)

        return zero_init_param

    return _replaced(Init, "_zero_init_param", wrap)


def _counting_loads(plan: Plan, progress: Progress) -> Any:
    """Advance the progress by each parameter that a checkpoint has filled."""
    from torch import nn

    stored = {p.name: plan.stored_numel(p) * 2 for p in plan.architecture.parameters}

    def wrap(original: Any) -> Any:
        def load_from_state_dict(self: Any, state_dict: Any, prefix: str, *args: Any) -> None:
            original(self, state_dict, prefix, *args)
            progress.advance(sum(stored.get(prefix + name, 0) for name in self._parameters))

        return load_from_state_dict

    return _replaced(nn.Module, "_load_from_state_dict", wrap)


def _quantizing_in(dtype: Any) -> Any:
    """Convert a checkpoint's tensor to the run's dtype, on the run's device, before DeepSpeed quantizes it.

    DeepSpeed quantizes in the checkpoint's dtype and then reads the bits of the scales in the run's: noise.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.inference.quantization.utils import Quantizer

    def wrap(original: Any) -> Any:
        def quantize(self: Any, tensor: Any) -> Any:
            return original(self, tensor.to(get_accelerator().current_device_name(), dtype))

        return quantize

    return _replaced(Quantizer, "quantize", wrap)


def _pinning_exactly() -> Any:
    """Pin each partition at its own size.

    torch's allocator copies into a block rounded up to a power of two: OPT-175B in INT4 would take 155 GB, not 98.
    """
    from deepspeed.accelerator import get_accelerator

    def wrap(original: Any) -> Any:
        def pin_memory(self: Any, tensor: Any, align_bytes: int = 1) -> Any:
            return _pinned_empty(tensor.numel(), tensor.dtype)

        return pin_memory

    return _replaced(type(get_accelerator()), "pin_memory", wrap)


class _PinnedPages(mmap.mmap):
    """Anonymous pages that CUDA knows: `cudaHostRegister` wants pages of their own, told before they are unmapped."""

    def __init__(self, *args: Any) -> None:
        self._address: int | None = None

    def register(self, address: int) -> None:
        self._address = address
        _register(address, len(self))

    def __del__(self) -> None:
        if self._address is not None:
            _cudart().cudaHostUnregister(self._address)


def _pinned_empty(numel: int, dtype: Any) -> Any:
    """An uninitialised pinned tensor."""
    import torch

    pages = _PinnedPages(-1, numel * dtype.itemsize)
    pages.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(pages, dtype=dtype, count=numel)
    pages.register(tensor.data_ptr())
    return tensor


def _cudart() -> Any:
    import torch

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _register(address: int, size: int) -> None:
    import torch

    torch.cuda.check_error(int(_cudart().cudaHostRegister(address, size, 0)))


def _register_swap_buffers(model: Any) -> None:
    """DeepSpeed locks its NVMe buffers in memory but does not tell CUDA, so copies from them are pageable ones."""
    from deepspeed.inference.quantization.utils import get_AsyncPartitionedParameterSwapper

    swapper = get_AsyncPartitionedParameterSwapper(model)
    if swapper is not None and not swapper.use_gds:
        buffers = swapper.buffers
        _register(buffers.data_ptr(), buffers.numel() * buffers.element_size())


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No report of missing keys for weights that are made, not loaded."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
