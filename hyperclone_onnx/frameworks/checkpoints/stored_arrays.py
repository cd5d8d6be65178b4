"""Arrays that lie in files, read when they are asked for; of safetensors files among others.

The library's own NumPy reader knows no bfloat16; the format is described in `safetensors_files.py`, which writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from hyperclone_onnx.errors import BadModel, BadRequest, first_line
from hyperclone_onnx.writing.safetensors_files import TYPES

Array = npt.NDArray[Any]

LARGEST_HEADER = 100_000_000
"""What safetensors itself allows."""


@dataclass(frozen=True)
class StoredArray:
    """An array whose shape and type are known, and that is read when it is called."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Array]

    def __call__(self) -> Array:
        """The array."""
        return self.read()


def from_torch(tensor: Any) -> StoredArray:
    """A torch tensor as a stored array, in its own type.

    Raises:
        BadRequest: it is a part of a sharded tensor.
    """
    if hasattr(tensor, "full_tensor"):
        raise BadRequest(
            "a sharded tensor: gather the weights with get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)), or save them with torch.distributed.checkpoint"
        )
    dtype = torch_dtype(tensor.dtype)
    return StoredArray(tuple(tensor.shape), dtype, lambda: torch_array(tensor, dtype))


def torch_dtype(dtype: Any) -> np.dtype[Any]:
    """NumPy's type for one of torch's."""
    name = str(dtype).removeprefix("torch.")
    return np.dtype(getattr(ml_dtypes, name, name))


def torch_array(tensor: Any, dtype: np.dtype[Any]) -> Array:
    """The elements of a torch tensor, in place where it is on the CPU."""
    import torch

    plain = tensor.detach().cpu()
    if dtype.type.__module__ != "numpy":  # torch gives NumPy only the types that it has itself
        plain = plain.view({1: torch.uint8, 2: torch.int16}[dtype.itemsize])
    array: Array = plain.numpy().view(dtype)
    return array


_TYPES = {name: np.dtype(kind.numpy()) for kind, name in TYPES.items()}


def read_safetensors(path: Path) -> dict[str, StoredArray]:
    """The arrays of a safetensors file; each is mapped when it is asked for.

    Raises:
        BadModel: the file cannot be read, is no safetensors file, or is truncated.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length <= min(size - 8, LARGEST_HEADER) else None
    except (OSError, ValueError) as problem:
        raise BadModel(f"{path}: not a readable safetensors file ({problem})") from problem
    if not isinstance(header, dict):
        raise BadModel(f"{path}: not a safetensors file, or truncated")
    header.pop("__metadata__", None)
    return {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _entry(path: Path, name: str, entry: Any, start: int, size: int) -> StoredArray:
    try:
        (begin, end), shape, kind = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
        count = math.prod(shape)
    except (TypeError, KeyError, ValueError) as problem:
        raise BadModel(f"{path}: its header is wrong at {name!r}") from problem
    dtype = _TYPES.get(kind)
    if dtype is None:
        raise BadModel(f"{path}: {name!r} is of the type {kind}, which cannot be read")
    if end - begin != count * dtype.itemsize or begin < 0 or start + end > size:
        raise BadModel(f"{path}: truncated, or its header is wrong: {name!r} needs {count * dtype.itemsize} bytes")

    def read() -> Array:
        if not count:
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, "c", start + begin, shape) if shape else _single(path, dtype, start + begin)

    return StoredArray(shape, dtype, read)


def _single(path: Path, dtype: np.dtype[Any], offset: int) -> Array:
    return np.fromfile(path, dtype, 1, offset=offset).reshape(())


def guarded(path: Path, name: str, read: Callable[[], Any]) -> Callable[[], Array]:
    """A reading of which whatever goes wrong is a broken checkpoint.

    The libraries that read checkpoints raise many types for a file that is cut off or overwritten.
    """

    def run() -> Array:
        try:
            return np.asarray(read())
        except Exception as problem:
            raise BadModel(
                f"{path}: {name!r} cannot be read, or is truncated ({first_line(problem, 160)})"
            ) from problem

    return run
