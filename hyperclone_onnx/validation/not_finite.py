"""Finds stored weights that are infinite or not a number. They grow as they are, and the report names them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.system.parallel import share_out, workers_for
from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.tensors.stored_rows import StoredRows
from hyperclone_onnx.writing.streaming import CHUNK

MASK = 1 << 26
"""The most elements of the constant of a mask."""


def not_finite(model: ir.Model, workers: int | None = None, finite: Collection[str] = ()) -> dict[str, int]:
    """The number of infinite elements and elements that are not a number, for each stored tensor that has some.

    The tensors are read block by block, with a fixed amount of memory. Those that are known to be `finite` are not.
    """
    tensors = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and _is_of_numbers(value.const_value.dtype) and name not in finite
    }
    counts: dict[str, int] = {}

    def counter() -> Callable[[str], tuple[str, int]]:
        scratch = Scratch()
        return lambda name: (name, _count(tensors[name], scratch))

    size = sum(array.nbytes for array in tensors.values())
    share_out(counter, list(tensors), workers_for(size, workers), lambda counted: counts.update([counted]))
    return {name: counts[name] for name in tensors if counts[name] and not _is_mask(tensors[name])}


def _is_mask(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor is the constant of a mask: nothing but zeros and minus infinity, or one number."""
    if tensor.size > MASK:
        return False
    numbers = np.asarray(tensor.numpy()).astype(np.float32)
    return tensor.size == 1 or bool(np.isin(numbers, [0.0, -np.inf]).all())


def named_not_finite(model: ir.Model, workers: int | None = None, finite: Collection[str] = ()) -> str:
    """A text that names the weights that are infinite or not a number. Empty if there are none."""
    counts = not_finite(model, workers, finite)
    if not counts:
        return ""
    first, *rest = [f"{name} ({count} elements)" for name, count in counts.items()]
    return f"{first}{f' and {len(rest)} more tensors' if rest else ''}"


def _is_of_numbers(dtype: ir.DataType) -> bool:
    return dtype.is_floating_point() and dtype.bitwidth >= 16


def _count(tensor: ir.TensorProtocol, scratch: Scratch) -> int:
    rows, kind = StoredRows(tensor, 1, tensor.nbytes), tensor.dtype.numpy()
    return sum(
        _count_in(rows.read_bytes(start, min(CHUNK, tensor.nbytes - start), scratch).view(kind))
        for start in range(0, tensor.nbytes, CHUNK)
    )


def _count_in(numbers: npt.NDArray[Any]) -> int:
    # A sum is several times faster than a test of each element; one that overflows is told apart then.
    with np.errstate(over="ignore", invalid="ignore"):
        total = numbers.sum(dtype=np.float32 if numbers.dtype.itemsize < 4 else None)
    return 0 if np.isfinite(total) else int(numbers.size - np.isfinite(numbers).sum())
