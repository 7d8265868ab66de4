"""Fill slabs: each layer's weights are made or read, and quantized, on the device, then copied to where they stay."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from zi_experiments.cost_model.plan import Plan
from zi_experiments.engines.stream import sharing
from zi_experiments.engines.stream.host_cache import HostCache
from zi_experiments.engines.stream.placement.parts import LayerPlacement
from zi_experiments.engines.stream.placement.room import BUFFERS
from zi_experiments.engines.stream.quantized import expand, pack
from zi_experiments.engines.stream.scaled import write
from zi_experiments.engines.stream.slab import (
    Layout,
    Place,
    expanded_views,
    experts_in,
    lay_out,
    plain_experts,
    plain_views,
)
from zi_experiments.engines.stream.store import Store
from zi_experiments.engines.stream.stripes import open_files
from zi_experiments.models.architecture import Parameter
from zi_experiments.models.weights import PretrainedWeights, RandomWeights
from zi_experiments.runtime import distributed, shared_memory
from zi_experiments.runtime.pinned_memory import host_empty, shared_empty
from zi_experiments.runtime.progress import Progress

READERS = 4  # modules of a checkpoint that are read at a time
AHEAD = 4  # slabs that are pinned in advance, while others are filled


class Loader:
    """Loads one model; takes weights by name from `weights`."""

    def __init__(self, plan: Plan, weights: RandomWeights | PretrainedWeights, device: Any, progress: Progress) -> None:
        self._plan, self._weights, self._device, self._progress = plan, weights, device, progress
        self._dtype = getattr(torch, plan.dtype)
        self._shares_memory = plan.ranks_each > 1 and not sharing.gathers(plan)
        self._owners = plan.ranks_each if self._shares_memory else 1  # ranks that fill a slab of this one's store
        self._parameters = {p.name: p for p in plan.architecture.parameters}
        # several modules of a checkpoint are read at a time; one module of random weights keeps the device busy
        self._readers = ThreadPoolExecutor(READERS if isinstance(weights, PretrainedWeights) else 1, "read")

    def close(self) -> None:
        self._readers.shutdown()

    def outside(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and value, on the device, of parameters outside the layers; quantized ones stay expanded."""
        for parameter in self._parameters.values():
            if parameter.layer is None:
                packing = self._plan.packing(parameter)
                layout = lay_out([("weight", parameter)], {parameter.name: packing} if packing else {})
                if layout.quantized:
                    slab = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._device)
                    self._pack(parameter.name, slab[None], layout, layout.quantized[0])
                    expanded = torch.empty(layout.elements, dtype=self._dtype, device=self._device)
                    expand(slab, layout, expanded)
                    value = expanded_views(expanded, layout)["weight"]
                else:
                    value = self._value(parameter)
                self._progress.advance(value.nbytes)
                yield parameter.name, value

    def resident(self, prefix: str, placed: LayerPlacement) -> torch.Tensor:
        """Return the slab of a layer's resident weights; `prefix` is the layer's name in the model."""
        slab = torch.empty(placed.resident.nbytes, dtype=torch.uint8, device=self._device)
        self._fill(slab, prefix, placed.resident)
        return slab

    def store(self, layers: dict[str, LayerPlacement], paths: list[Path], cache: HostCache | None) -> Store:
        """Return the store of what this rank brings of streamed weights, from host memory or from the files `paths`.

        It fills its shares of them. `layers` are given by their names in the model. A `cache` of what is in the file is
        filled.
        """
        placed = list(layers.values())
        shares = [layer.streamed.nbytes // layer.streamed.shares for layer in placed]
        on_disk = [share for share, layer in zip(shares, placed, strict=True) if layer.on_disk]
        file, buffers = None, []
        if on_disk:
            aio = self._plan.run.offload.aio
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
            file = open_files(list(map(str, paths)), sum(on_disk), aio.block_size, aio.intra_op_parallelism, BUFFERS)
            buffers = [self._host_empty(max(on_disk)) for _ in range(BUFFERS)]
        slabs: list[torch.Tensor | int] = []
        offset, spare = 0, cycle([(buffer, list[Future[None]]()) for buffer in buffers] or [(torch.empty(0), [])])
        for prefix, layer, share, made in zip(layers, placed, shares, self._made(placed, shares), strict=True):
            staging = self._staged(prefix, layer)
            if made is not None:
                own = made[self._own(share)] if self._shares_memory else made
                own.copy_(staging, non_blocking=True)
                slabs.append(made)
            else:
                assert file is not None
                buffer, writes = next(spare)
                _wait(writes)
                buffer[:share].copy_(staging)
                writes[:] = file.write(buffer[:share], offset)
                if cache:
                    cache.fill(len(slabs), buffer[:share])
                slabs.append(offset)
                offset += share
        for _ in buffers:
            _wait(next(spare)[1])
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        if self._shares_memory:
            distributed.barrier()  # the others have filled their shares too
        kept, wraps = cache.kept if cache else None, not self._plan.storage.routes
        store = Store(slabs, file, buffers, kept=kept, wraps=wraps, owners=self._owners)
        if cache:
            cache.attach(store)
        store.start([self._owners * share for share in shares])
        return store

    def _own(self, share: int) -> slice:
        """Return the bytes of a slab that this rank fills."""
        number = distributed.rank() % sharing.sharers(self._plan)
        return slice(number * share, (number + 1) * share)

    def _staged(self, prefix: str, layer: LayerPlacement) -> torch.Tensor:
        """Return this rank's share of a layer's streamed slab, on the device."""
        slab = torch.empty(layer.streamed.nbytes, dtype=torch.uint8, device=self._device)
        self._fill(slab, prefix, layer.streamed)
        return slab[self._own(len(slab) // layer.streamed.shares)]

    def _fill(self, slab: torch.Tensor, prefix: str, layout: Layout) -> None:
        modules = defaultdict(list)
        for fill in (self._fill_own(slab, prefix, layout), self._fill_experts(slab, prefix, layout)):
            for name, one in fill:
                modules[name.rpartition(".")[0]].append(one)

        @torch.no_grad()
        def fill_module(parameters: list[Callable[[], None]]) -> None:
            for fill in parameters:
                fill()

        for _ in self._readers.map(fill_module, modules.values()):
            pass  # a failure is raised here
        self._progress.advance(layout.nbytes)

    def _fill_own(self, slab: torch.Tensor, prefix: str, layout: Layout) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yield each parameter's name, beside experts, and what fills its place in a slab."""
        plain = plain_views(slab, layout.own, self._dtype)
        for place in layout.plain:
            yield place.name, partial(self._weights.fill, f"{prefix}.{place.name}", plain[place.name])
        for place in layout.quantized:
            yield place.name, partial(self._pack, f"{prefix}.{place.name}", slab[None], layout, place)

    def _fill_experts(
        self, slab: torch.Tensor, prefix: str, layout: Layout
    ) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yield each stacked parameter's name, and what fills its places in a slab."""
        if layout.experts is None:
            return
        experts, each = experts_in(slab, layout), layout.experts.each
        for name, stacked in plain_experts(experts, each, self._dtype).items():
            yield name, partial(self._copy, f"{prefix}.{name}", stacked)
        for place in each.quantized:
            yield place.name, partial(self._pack, f"{prefix}.{place.name}", experts, each, place)

    def _pack(self, name: str, slabs: torch.Tensor, layout: Layout, place: Place) -> None:
        """Quantize a parameter into its place in a slab, or a stack of them into slabs of shape (experts, bytes).

        One that is quantized already is copied as it is.
        """
        parameter = self._parameters[name]
        if self._plan.run.quant.is_native:
            assert parameter.native is not None
            packed = self._weights.packed(name, parameter.shape, parameter.native, self._dtype, self._device)
            write(packed, slabs, layout, place)
            return
        value = self._value(parameter).view(len(slabs), *place.shape)
        for slab, one in zip(slabs, value, strict=True):
            pack(one, slab, layout, place)

    def _copy(self, name: str, target: torch.Tensor) -> None:
        target.copy_(self._value(self._parameters[name]))

    def _value(self, parameter: Parameter) -> torch.Tensor:
        value = torch.empty(parameter.shape, dtype=self._dtype, device=self._device)
        self._weights.fill(parameter.name, value)
        return value

    def _made(self, placed: list[LayerPlacement], shares: list[int]) -> Iterator[torch.Tensor | None]:
        """Yield host memory for each slab, pinned by other threads a few slabs ahead; None for slabs on disk."""
        make = self._shared(shares) if self._shares_memory else lambda index: self._host_empty(shares[index])
        with ThreadPoolExecutor(AHEAD, "pin") as threads:
            waiting = [
                None if layer.on_disk else threads.submit(make, index) for index, layer in enumerate(placed[:AHEAD])
            ]
            for index in range(len(placed)):
                made = waiting[index]
                ahead = index + AHEAD
                if ahead < len(placed):
                    waiting.append(None if placed[ahead].on_disk else threads.submit(make, ahead))
                yield made.result() if made is not None else None
                waiting[index] = None

    def _shared(self, shares: list[int]) -> Callable[[int], torch.Tensor]:
        """Return what makes each slab, by its index, in memory that the ranks of this machine share."""
        sizes = [self._owners * share for share in shares]
        given = shared_memory.descriptors(sizes, self._owners)

        def make(index: int) -> torch.Tensor:
            own, pinned = self._own(shares[index]), self._plan.pin_memory
            made: torch.Tensor = shared_empty(given[index], sizes[index], own, pinned=pinned)
            return made

        return make

    def _host_empty(self, nbytes: int) -> torch.Tensor:
        made: torch.Tensor = host_empty(nbytes, torch.uint8, pinned=self._plan.pin_memory)
        return made


def _wait(requests: list[Future[None]]) -> None:
    for request in requests:
        request.result()
