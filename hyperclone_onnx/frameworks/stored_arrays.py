"""Arrays that lie in files, and the safetensors files that hold them: read by need, written in blocks.

The format is that of https://github.com/huggingface/safetensors: the length of a header, the header as JSON, the bytes.
Its own NumPy reader knows no bfloat16, and its writer wants all tensors in memory at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from hyperclone_onnx.errors import BadModel, BadRequest, CannotWrite

Array = npt.NDArray[Any]
Windows = tuple[slice, ...]

BLOCK = 8 << 20
"""Arrays are written in blocks of about this many bytes."""

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


class Sliced(Protocol):
    """What can be written in blocks: it answers slices of its leading axes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its elements."""

    def __getitem__(self, windows: Any) -> Array: ...


_TYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


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


def write_safetensors(path: Path, arrays: Mapping[str, Sliced]) -> None:
    """Write arrays block by block.

    Raises:
        CannotWrite: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + math.prod(array.shape) * array.dtype.itemsize
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                for windows in blocks(array.shape, array.dtype.itemsize):
                    file.write(np.ascontiguousarray(array[windows]).tobytes())
    except OSError as problem:
        raise CannotWrite(f"{path}: cannot be written ({problem.strerror or problem})") from problem


def blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[Windows]:
    """Windows of whole rows that cover an array, about `BLOCK` bytes each.

    >>> list(blocks((3, 1 << 20), 4))
    [(slice(0, 2, None),), (slice(2, 3, None),)]
    """
    if not shape:
        yield ()
        return
    rows = max(1, BLOCK // max(1, math.prod(shape[1:]) * itemsize))
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])),)
