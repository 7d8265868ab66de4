"""DeepSpeed's groupwise asymmetric format: packed into slabs when a model is loaded, expanded before a layer runs.

With `n` = 2^bits − 1 and the smallest and largest value of a group, scale = n / (largest − smallest), code =
round((x − smallest) · scale), and a weight is code / scale + smallest, each step rounded to the 16-bit type.
"""

import torch

from zi_experiments.config.schema import Quant
from zi_experiments.engines.stream.slab import Layout, Place

BLOCK = 1 << 26  # elements that are packed at a time, so that temporaries stay small


def pack(weight: torch.Tensor, slab: torch.Tensor, layout: Layout, place: Place) -> None:
    """Quantize a matrix (rows, columns), or a stack of them, into its place in a slab of bytes on the same device."""
    codes, scales, minima = _parts(slab, layout, weight.dtype)
    rows = weight.reshape(-1, weight.shape[-1])
    group_size, per_byte = layout.quant.group_size, 8 // layout.quant.bits
    assert group_size is not None
    step = max(1, BLOCK // rows.shape[1] // group_size) * group_size
    for first in range(0, len(rows), step):
        block = rows[first : first + step]
        start = place.start + first * rows.shape[1]
        integers, scale, minimum = _quantize(block, layout.quant)
        if per_byte == 2:
            integers = integers[0::2] << 4 | integers[1::2]
        codes[start // per_byte :][: len(integers)] = integers
        scales[start // group_size :][: len(scale)] = scale
        minima[start // group_size :][: len(minimum)] = minimum


def _quantize(rows: torch.Tensor, quant: Quant) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the integers as bytes, the scales and the minima of some rows, each flat."""
    assert quant.group_dim is not None
    groups = rows.unflatten(  # type: ignore[no-untyped-call]
        quant.group_dim, (-1, quant.group_size)
    )
    within = quant.group_dim + 1
    low, high = torch.aminmax(groups, dim=within, keepdim=True)
    largest = 2**quant.bits - 1
    scale = largest / (high - low)
    # a group of values so close that its scale overflows gets codes of zero, as the kernel expects
    codes = ((groups - low) * scale).nan_to_num_(0.0, posinf=0.0).round_().clamp_(0, largest).to(torch.uint8)
    return codes.flatten(), scale.flatten(), low.flatten()


def expand(slab: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
    """Expand all quantized parameters of a slab into a flat tensor of 16-bit elements on the same device."""
    if not layout.elements:
        return
    if slab.is_cuda:
        from zi_experiments.engines.stream.kernel import expand_spans  # Triton comes with CUDA builds of torch

        expand_spans(*_parts(slab, layout, out.dtype), out, spans(layout), layout.quant)
        return
    codes, scales, minima = _parts(slab, layout, out.dtype)
    group_size, per_byte = layout.quant.group_size, 8 // layout.quant.bits
    assert group_size is not None
    for start, rows, columns in spans(layout):
        target = out[start : start + rows * columns]
        packed = codes[start // per_byte :][: rows * columns // per_byte]
        if per_byte == 2:
            target[0::2] = packed >> 4
            target[1::2] = packed & 15
        else:
            target.copy_(packed)
        shape = (-1, group_size, columns) if layout.quant.group_dim == 0 else (rows, columns)
        groups = (-1, 1, columns) if layout.quant.group_dim == 0 else (rows, 1)
        count = rows * columns // group_size
        scale, minimum = (part[start // group_size :][:count].view(groups) for part in (scales, minima))
        target.view(shape).div_(scale).add_(minimum)


def spans(layout: Layout) -> list[tuple[int, int, int]]:
    """Return the spans that are expanded one at a time: (first element, rows, columns).

    Groups along rows are contiguous, whatever the shape of a matrix, so all matrices are one span. Groups across rows
    depend on the columns of their matrix.
    """
    if layout.quant.group_dim == 1:
        assert layout.quant.group_size is not None
        return [(0, layout.elements // layout.quant.group_size, layout.quant.group_size)]
    return [(place.start, (place.end - place.start) // place.shape[-1], place.shape[-1]) for place in layout.quantized]


def _parts(slab: torch.Tensor, layout: Layout, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, scales, minima = (slab[region] for region in layout.regions)
    return codes, scales.view(dtype), minima.view(dtype)
