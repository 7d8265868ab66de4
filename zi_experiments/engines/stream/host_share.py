"""Which decoder layers compute decode steps on the host, and what that takes of memory. Figures only."""

from zi_experiments.config.schema import CacheDevice, OffloadDevice, Quant
from zi_experiments.cost_model.spec import ELEMENT_BYTES, Spec
from zi_experiments.engines.stream import routing

INT4_GROUPS = (32, 64, 128, 256)  # sizes that the host's product supports


def obstacle(spec: Spec) -> str | None:
    """Return why the host computes no layer, in words; None if it can."""
    run, arch = spec.run, spec.architecture
    if run.hardware.num_gpus > 1:
        return "the host computes layers with one GPU only"
    if run.offload.device is OffloadDevice.nvme:
        return "the host computes layers from host memory only, not from disk"
    if run.quant.is_quantized and not _multiplies(spec):
        return "the host computes 16-bit layers, and INT4 of linear layers in groups of 32 to 256 inputs"
    if routing.pays(spec):
        return "experts are brought one by one, and the host computes whole layers"
    cached = sum(layer.elements_per_token > 0 for layer in arch.kv_layers)
    hands_on = getattr(arch.config.get_text_config(), "num_kv_shared_layers", None)
    if arch.has_own_cache or hands_on or cached < arch.num_layers:
        return f"the host computes layers with a KV cache of their own, and {arch.model_type} has others"
    return None


def _multiplies(spec: Spec) -> bool:
    """Return whether the host's INT4 product supports all quantized weights of the layers."""
    quantized = [p for p in spec.architecture.parameters if p.layer is not None and spec.is_quantized(p)]
    return supports(spec.run.quant) and all(p.is_linear and not p.experts for p in quantized)


def supports(quant: Quant) -> bool:
    """Return whether the host multiplies weights that are quantized like that."""
    return quant.bits == 4 and quant.group_dim == 1 and quant.group_size in INT4_GROUPS


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
