"""Arrays in files, whose values are read only when they are needed; and the reader of safetensors files.

We read safetensors ourselves because the library's NumPy reader cannot read bfloat16. `safetensors_files.py`, which
writes the format, describes it.
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
"""The largest header in bytes that the safetensors library allows."""


@dataclass(frozen=True)
class StoredArray:
    """An array in a file. Its shape and type are known; calling the object reads its values."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Array]

    def __call__(self) -> Array:
        """Read the array."""
        return self.read()

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def values(array: Array | StoredArray) -> Array:
    """The array in memory; a stored one is read."""
    return array() if isinstance(array, StoredArray) else array


def from_torch(tensor: Any) -> StoredArray:
    """Wrap a torch tensor as a stored array of the same type.

    Raises:
        BadRequest: the tensor is sharded, so this process has only a part of it.
    """
    if hasattr(tensor, "full_tensor"):
        raise BadRequest(
            "a tensor is sharded, this process has only a part: gather the weights with get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)), or save them with torch.distributed.checkpoint"
        )
    dtype = torch_dtype(tensor.dtype)
    return StoredArray(tuple(tensor.shape), dtype, lambda: torch_array(tensor, dtype))


def dtype_named(name: str) -> np.dtype[Any]:
    """Return NumPy's type of a name, such as bfloat16."""
    return np.dtype(getattr(ml_dtypes, name, name))


def torch_dtype(dtype: Any) -> np.dtype[Any]:
    """Return NumPy's type for a type of torch."""
    return dtype_named(str(dtype).removeprefix("torch."))


def torch_array(tensor: Any, dtype: np.dtype[Any]) -> Array:
    """Return a torch tensor as an array of type `dtype`. It shares the tensor's memory if the tensor is on the CPU."""
    import torch

    plain = tensor.detach().cpu()
    if dtype.type.__module__ != "numpy":  # torch converts only the types that NumPy itself has
        plain = plain.view({1: torch.uint8, 2: torch.int16}[dtype.itemsize])
    array: Array = plain.numpy().view(dtype)
    return array


_TYPES = {name: np.dtype(kind.numpy()) for kind, name in TYPES.items()}


def read_safetensors(path: Path) -> dict[str, StoredArray]:
    """Open a safetensors file and return its arrays by name. An array is mapped into memory when it is read.

    Raises:
        BadModel: the file cannot be read, is not a safetensors file, or is truncated.
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
        raise BadModel(f"{path}: {name!r} has the type {kind}, which we cannot read")
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
    """Wrap a function that reads an array, so that any exception in it becomes a BadModel that names the array.

    The libraries that read checkpoints raise exceptions of many types for a truncated or overwritten file.
    """

    def run() -> Array:
        try:
            return np.asarray(read())
        except Exception as problem:
            raise BadModel(
                f"{path}: {name!r} cannot be read, or is truncated ({first_line(problem, 160)})"
            ) from problem

    return run
