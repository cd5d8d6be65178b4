"""The weights of a checkpoint, each made when it is its turn to be written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.safetensors_files import write_safetensors

Array = npt.NDArray[Any]

LARGEST_SHARD = 5_000_000_000
"""Bytes of one file, as transformers' own limit has long been."""


@dataclass(frozen=True)
class Entry:
    """One tensor to write: its shape, its type as numpy calls it, and how to get it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Array]

    def lazy(self, name: str) -> ir.LazyTensor:
        """The tensor, made when it is written."""
        try:
            dtype = ir.DataType.from_numpy(np.dtype(self.dtype)) if self.dtype != "bfloat16" else ir.DataType.BFLOAT16
        except TypeError:
            raise Refused(f"{name}: safetensors has no type for {self.dtype}") from None

        def made() -> ir.TensorProtocol:
            array = self.read()
            if array.shape != self.shape or array.dtype.name != self.dtype:
                raise AssertionError(f"{name}: {array.dtype} {array.shape} instead of {self.dtype} {self.shape}")
            return ir.Tensor(np.ascontiguousarray(array).reshape(self.shape), dtype=dtype, name=name)

        return ir.LazyTensor(made, dtype=dtype, shape=ir.Shape(self.shape), name=name)


def write_weights(
    folder: Path,
    entries: Mapping[str, Entry],
    largest: int = LARGEST_SHARD,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write `model.safetensors`, or its shards and their index; the names of the files.

    Raises:
        CannotWrite: the disk is full, or the folder cannot be written.
        Refused: safetensors has no type for a tensor.
    """
    tensors = {name: entry.lazy(name) for name, entry in entries.items()}
    files = write_safetensors(tensors, folder, largest, metadata={"format": "pt"}, progress=progress)
    return [each.name for each in files]
