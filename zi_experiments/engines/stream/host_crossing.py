"""The thread that computes layers on the host, and the way there and back.

Operations of the GPU are launched ahead: it waits for what the host computes, and the thread that launches does not.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch

Forward = Callable[[torch.Tensor], Any]  # a layer on the host, of its hidden states


class Crossing:
    """What layers are called with goes to the host, and their outputs come back, through pinned buffers.

    What all layers of a step share, such as masks and rotary tables, crosses once in a step. Between two layers of the host
    nothing crosses back and forth.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        threads = partial(torch.set_num_threads, torch.get_num_threads())  # each thread has a number of its own
        self._worker = ThreadPoolExecutor(1, "host-layers", initializer=threads)
        self._shared: dict[int, tuple[Any, Any]] = {}  # by identity: what crossed in this step, and its copy
        self._output: tuple[Any, Future[Any] | None] = None, None  # of the latest layer: on the device, and its job
        self._jobs: list[Future[Any]] = []  # of this pass

    def begin(self) -> None:
        """Begin a pass; one that has failed may have left something."""
        self._shared.clear()
        self._jobs.clear()
        self._output = None, None

    def shared(self, value: Any) -> Any:
        """Return an argument of a layer on the host."""
        if isinstance(value, torch.Tensor):
            if value.device.type == "cpu":
                return value
            if id(value) not in self._shared:
                self._shared[id(value)] = value, value.to("cpu")
            return self._shared[id(value)][1]
        if isinstance(value, tuple | list):
            return type(value)(self.shared(one) for one in value)
        if isinstance(value, dict):
            return {key: self.shared(one) for key, one in value.items()}
        return value

    def compute(self, place: "Place", states: torch.Tensor, forward: Forward) -> Any:
        """Return on the device what `forward` returns on the host for a layer's hidden states."""
        done, before = place.begin(states), self._output[1] if states is self._output[0] else None
        leave = place.leave(states) if before is None else lambda: _states_of(before.result())
        job = self._worker.submit(_computed, place, leave, forward, done, torch.is_inference_mode_enabled())
        self._jobs.append(job)
        if place.has_others is None or self._device.type == "cpu":
            place.learn(job.result())
        back = place.arrive(states, job)
        self._output = back, job
        if place.has_others is False:
            return (back, *place.nothing) if place.is_tuple else back
        return back, *(self._other_back(one) for one in job.result()[1:])

    def _other_back(self, value: Any) -> Any:
        return value.to(self._device) if isinstance(value, torch.Tensor) else value

    def finish(self) -> None:
        """Wait until the host has computed all layers of a pass; raise what failed there."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()

    def close(self) -> None:
        self._worker.shutdown()


def _states_of(output: Any) -> torch.Tensor:
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _computed(
    place: "Place", leave: Callable[[], torch.Tensor], forward: Forward, done: Callable[[], None], is_inference: bool
) -> Any:
    """Return a layer's output, in the thread of the host; the device goes on whatever happens."""
    try:
        with torch.inference_mode(is_inference), torch.no_grad():
            output = forward(leave())
            place.write(_states_of(output))
            return output
    finally:
        done()


class Place:
    """Where the hidden states of one layer cross: on a CPU nothing does."""

    def __init__(self) -> None:
        # known once the layer was computed: whether its output is a tuple, how many None follow the states, or other things
        self.is_tuple = False
        self.nothing: tuple[None, ...] = ()
        self.has_others: bool | None = None

    def learn(self, output: Any) -> None:
        """Note what a layer's output consists of."""
        others = output[1:] if isinstance(output, tuple) else ()
        self.is_tuple, self.nothing = isinstance(output, tuple), (None,) * len(others)
        self.has_others = any(one is not None for one in others)

    def begin(self, like: torch.Tensor) -> Callable[[], None]:
        """Begin a pass with such hidden states. Return what tells the device that their output is there."""
        return lambda: None

    def leave(self, states: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Return what waits for hidden states on the host."""
        return lambda: states

    def write(self, states: torch.Tensor) -> None:
        """Write an output to where the device reads it."""

    def arrive(self, like: torch.Tensor, job: Future[Any]) -> torch.Tensor:
        """Return an output on the device."""
        return _states_of(job.result())


class PinnedPlace(Place):
    """Pinned buffers of one layer; the device waits for a number that the host writes after an output."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._left = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._into = self._out = torch.empty(0)
        self._done = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._number = self._done.numpy()
        self._begun = 0

    def begin(self, like: torch.Tensor) -> Callable[[], None]:
        self._begun += 1
        if self._into.shape != like.shape or self._into.dtype != like.dtype:
            with torch.inference_mode(mode=False):  # passes in other modes write to them too
                self._into, self._out = (torch.empty(like.shape, dtype=like.dtype, pin_memory=True) for _ in range(2))
        return partial(self._number.__setitem__, 0, self._begun)

    def leave(self, states: torch.Tensor) -> Callable[[], torch.Tensor]:
        self._into.copy_(states, non_blocking=True)
        self._left.record()
        return self._arrived

    def _arrived(self) -> torch.Tensor:
        self._left.synchronize()
        return self._into

    def write(self, states: torch.Tensor) -> None:
        self._out.copy_(states)

    def arrive(self, like: torch.Tensor, job: Future[Any]) -> torch.Tensor:
        from zi_experiments.engines.stream.pinned_kernel import read  # imports Triton, which a CPU does not need

        _wait_for(self._done, self._begun, torch.cuda.current_stream(self._device))
        return read(self._out, self._device)


def _wait_for(number: torch.Tensor, least: int, stream: Any) -> None:
    """Let later operations on a stream wait until a pinned number is so large; this takes none of the GPU's processors."""
    wait = _driver().cuStreamWaitValue32_v2
    status = wait(
        *map(ctypes.c_void_p, (stream.cuda_stream, number.data_ptr())), ctypes.c_uint32(least), ctypes.c_uint(0)
    )
    if status:
        raise RuntimeError(f"the GPU cannot wait for the host: CUDA error {status}")


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")
