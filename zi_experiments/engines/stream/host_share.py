"""Which decoder layers compute decode steps on the host, and what that takes of memory. Figures only."""

from collections.abc import Iterable

from zi_experiments.config.schema import CacheDevice, OffloadDevice
from zi_experiments.cost_model.spec import ELEMENT_BYTES, Spec
from zi_experiments.engines.stream import routing
from zi_experiments.models.architecture import Parameter

GROUP_STEP = 32  # groups that the host's products support are multiples of it


def obstacle(spec: Spec) -> str | None:
    """Return why the host computes no layer, in words; None if it can."""
    run, arch = spec.run, spec.architecture
    if run.hardware.num_gpus > 1:
        return "the host computes layers with one GPU only"
    if run.offload.device is OffloadDevice.nvme:
        return "the host computes layers from host memory only, not from disk"
    if run.quant.is_quantized and not _multiplies_layers(spec):
        return f"the host computes 16-bit layers, and linear layers quantized in groups of a multiple of {GROUP_STEP} inputs"
    if routing.pays(spec):
        return "experts are brought one by one, and the host computes whole layers"
    cached = sum(layer.elements_per_token > 0 for layer in arch.kv_layers)
    hands_on = getattr(arch.config.get_text_config(), "num_kv_shared_layers", None)
    if arch.has_own_cache or hands_on or cached < arch.num_layers:
        return f"the host computes layers with a KV cache of their own, and {arch.model_type} has others"
    return None


def _multiplies_layers(spec: Spec) -> bool:
    """Return whether the host's product supports all quantized weights of the layers."""
    quantized = [p for p in spec.architecture.parameters if p.layer is not None and spec.is_quantized(p)]
    return not any(p.experts for p in quantized) and multiplies(spec, quantized)


def multiplies(spec: Spec, quantized: Iterable[Parameter]) -> bool:
    """Return whether the host's product supports these quantized weights."""
    quant = spec.run.quant
    if quant.bits is None or quant.group_dim != 1 or quant.group_size is None or quant.group_size % GROUP_STEP:
        return False
    return all(p.is_linear and p.shape[-1] % quant.group_size == 0 for p in quantized)


def layers(spec: Spec) -> tuple[int, ...]:
    """Return the numbers of the layers that the host computes: spread evenly, the first one on the GPU if possible.

    So the link brings the next layer of the GPU while the host computes.
    """
    share, count = spec.run.offload.compute, spec.architecture.num_layers
    if not isinstance(share, float | int) or spec.run.offload.device is OffloadDevice.none or obstacle(spec):
        return ()
    wanted = round(share * count)
    return tuple(index for index in range(count) if (index + 1) * wanted // count > index * wanted // count)


def kv_bytes(spec: Spec, on_host: tuple[int, ...]) -> int:
    """Return the bytes of KV cache that are in host memory because the host computes these layers, over all ranks."""
    if spec.run.kv_cache.device is CacheDevice.cpu:
        return 0  # all of it is there
    work, kv = spec.run.workload, spec.architecture.kv_layers
    tokens = work.prompt_len + work.gen_len
    return ELEMENT_BYTES * work.sequences * sum(kv[index].elements(tokens) for index in on_host)
