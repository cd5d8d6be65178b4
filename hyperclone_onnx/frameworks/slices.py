"""Read parts of stored tensors, so that a rank reads its own shard and never a whole sharded tensor."""

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
"""One slice with step 1 for each axis of a tensor."""

BLOCK = 8 << 20
"""Tensors are read in blocks of about this many bytes."""


def shape_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """Return the shape of a stored tensor as a tuple of ints."""
    return tuple(int(size) for size in tensor.shape.numpy())


def read_slice(tensor: ir.TensorProtocol, windows: Windows) -> Array:
    """Read a part of a stored tensor. Little more than that part is read from the file (or computed).

    Args:
        tensor: a tensor in memory, a tensor in a file, or a grown tensor that is computed when it is read.
        windows: one slice with step 1 for each axis; () for a single number.

    Returns:
        An array of the windows' shape and the tensor's own type. It may be a view of the tensor's memory.
    """
    if isinstance(tensor, LazyGrown) and tensor.grown.recipe.bits is None:
        return np.asarray(tensor.grown[windows])
    if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.bitwidth >= 8 and windows:
        return _read_rows(tensor, windows[0])[(slice(None), *windows[1:])]
    return np.asarray(np.asarray(tensor.numpy())[windows])


def read_whole(tensor: ir.TensorProtocol) -> Array:
    """Read a whole stored tensor."""
    return read_slice(tensor, tuple(slice(0, size) for size in shape_of(tensor)))


def _read_rows(tensor: ir.ExternalTensor, rows: slice) -> Array:
    """Read rows of a tensor in a file. We read and do not map: mapped pages would count as this process's memory."""
    shape, dtype = shape_of(tensor), np.dtype(tensor.dtype.numpy())
    start, stop, _ = rows.indices(shape[0])
    stored = StoredRows(tensor, shape[0], math.prod(shape[1:]) * dtype.itemsize)
    try:
        return stored.read(start, stop - start, Scratch()).view(dtype).reshape(stop - start, *shape[1:])
    finally:
        stored.close()


def blocks(shape: Sequence[int], itemsize: int, size: int = BLOCK) -> Iterator[Windows]:
    """Yield windows of whole rows, of about `size` bytes each, that together cover a tensor of this shape.

    A scalar gives the one window (). A tensor without elements gives none.

    >>> list(blocks((3, 1 << 20), 4))
    [(slice(0, 2, None), slice(0, 1048576, None)), (slice(2, 3, None), slice(0, 1048576, None))]
    """
    if not shape:
        yield ()
        return
    if 0 in shape:
        return
    rest = tuple(slice(0, length) for length in shape[1:])
    rows = max(1, size // (math.prod(shape[1:]) * itemsize))
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])), *rest)


def shifted(windows: Windows, offsets: Sequence[int]) -> Windows:
    """Convert windows of a shard to windows of the whole tensor, in which the shard begins at `offsets`."""
    return tuple(
        slice(window.start + offset, window.stop + offset) for window, offset in zip(windows, offsets, strict=True)
    )
