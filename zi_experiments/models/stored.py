"""The tensors of a checkpoint's files by name, read one at a time; quantized ones become 16-bit when they are read."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor of a checkpoint, not read yet."""

    shape: tuple[int, ...]
    dtype: Any  # torch's, of what `read` returns; for an expanded tensor it is the run's
    nbytes: int  # in the file
    # `read(device, index)` → the tensor on a device, or the part `[index:index + 1]` of its first dimension
    read: Callable[[Any, int | None], Any]
    parts: "dict[str, Stored] | None" = None  # what it is expanded from, by local names; None: it is not quantized

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def without_data(self) -> Any:
        """Return a tensor of the shape and dtype on the meta device."""
        import torch

        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def in_file(file: Path) -> dict[str, Stored]:
    """Return the tensors of a file that safetensors or `torch.save` has written."""
    return _in_safetensors(file) if file.suffix == ".safetensors" else _in_pickle(file)


def _in_safetensors(file: Path) -> dict[str, Stored]:
    from safetensors import safe_open

    # torch maps files as writable, which needs free memory: not until a tensor is read
    with safe_open(file, framework="numpy") as opened:
        names = opened.keys()
        slices = {name: opened.get_slice(name) for name in names}
        described = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    return {name: _in_slice(_Handle(file), name, *form) for name, form in described.items()}


class _Handle:
    """A safetensors file, opened when a tensor is read."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self, name: str, device: Any, index: int | None) -> Any:
        from safetensors import safe_open

        with safe_open(self._file, framework="pt") as opened:
            if index is None:
                return opened.get_tensor(name).to(device)
            return opened.get_slice(name)[index : index + 1].to(device)


def _in_slice(handle: _Handle, name: str, shape: tuple[int, ...], stored: str) -> Stored:
    import torch
    from transformers.modeling_utils import str_to_torch_dtype

    dtype = str_to_torch_dtype.get(stored, torch.uint8)  # if torch lacks the type, only the shape counts

    def read(device: Any, index: int | None) -> Any:
        return handle.read(name, device, index)

    return Stored(shape=shape, dtype=dtype, nbytes=prod(shape) * dtype.itemsize, read=read)


def _in_pickle(file: Path) -> dict[str, Stored]:
    import torch
    from transformers.modeling_utils import load_state_dict

    with torch.serialization.skip_data():  # meta alone may read the tensors, as in checkpoint.py
        described = load_state_dict(file, map_location="meta")
    opened: dict[str, Any] = {}

    def reading(name: str) -> Callable[[Any, int | None], Any]:
        def read(device: Any, index: int | None) -> Any:
            if not opened:
                opened.update(load_state_dict(file, map_location="cpu"))  # the file is mapped into memory
            tensor = opened[name]
            return (tensor if index is None else tensor[index : index + 1]).to(device)

        return read

    return {
        name: Stored(shape=tuple(meta.shape), dtype=meta.dtype, nbytes=meta.nbytes, read=reading(name))
        for name, meta in described.items()
    }
