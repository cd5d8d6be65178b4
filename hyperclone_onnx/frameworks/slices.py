"""Parts of stored tensors: what a rank reads is its own shard, whole tensors are never needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.tensors.grown_tensor import LazyGrown
from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.tensors.stored_rows import StoredRows

Array = npt.NDArray[Any]
Windows = tuple[slice, ...]
"""A slice with step 1 for each axis."""

BLOCK = 8 << 20
"""Tensors are read in blocks of about this many bytes."""


def shape_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a stored tensor."""
    return tuple(int(size) for size in tensor.shape.numpy())


def read_slice(tensor: ir.TensorProtocol, windows: Windows) -> Array:
    """A part of a stored tensor, reading (or computing) little more of it than that part.

    Args:
        tensor: in memory, in a file, or grown while it is read.
        windows: one slice with step 1 for each axis; () for a single number.

    Returns:
        An array of the windows' shape in the tensor's own type; it may be a view.
    """
    if isinstance(tensor, LazyGrown) and tensor.grown.recipe.bits is None:
        return np.asarray(tensor.grown[windows])
    if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.bitwidth >= 8 and windows:
        return _read_rows(tensor, windows[0])[(slice(None), *windows[1:])]
    return np.asarray(np.asarray(tensor.numpy())[windows])


def read_whole(tensor: ir.TensorProtocol) -> Array:
    """A whole stored tensor."""
    return read_slice(tensor, tuple(slice(0, size) for size in shape_of(tensor)))


def _read_rows(tensor: ir.ExternalTensor, rows: slice) -> Array:
    """Rows of a tensor in a file. They are read, not mapped: mapped pages would count as this process's memory."""
    shape, dtype = shape_of(tensor), np.dtype(tensor.dtype.numpy())
    start, stop, _ = rows.indices(shape[0])
    stored = StoredRows(tensor, shape[0], math.prod(shape[1:]) * dtype.itemsize)
    try:
        return stored.read(start, stop - start, Scratch()).view(dtype).reshape(stop - start, *shape[1:])
    finally:
        stored.close()


def blocks(shape: Sequence[int], itemsize: int) -> Iterator[Windows]:
    """Windows of whole rows that cover a tensor of this shape, about `BLOCK` bytes each.

    >>> list(blocks((3, 1 << 20), 4))
    [(slice(0, 2, None), slice(0, 1048576, None)), (slice(2, 3, None), slice(0, 1048576, None))]
    """
    if not shape:
        yield ()
        return
    if 0 in shape:
        return
    rest = tuple(slice(0, size) for size in shape[1:])
    rows = max(1, BLOCK // (math.prod(shape[1:]) * itemsize))
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])), *rest)


def shifted(windows: Windows, offsets: Sequence[int]) -> Windows:
    """Windows of a shard as windows of the whole, the shard beginning at `offsets`."""
    return tuple(slice(w.start + o, w.stop + o) for w, o in zip(windows, offsets, strict=True))
