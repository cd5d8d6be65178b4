"""Reads a source tensor as rows and columns, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.plan.maps import AxisIndex, fills_of
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.tensors.packing import packed_width, unpack
from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.tensors.stored_rows import StoredRows

Array = npt.NDArray[Any]


ROWS = 1 << 16
"""The number of elements that are summed at a time."""


class SourceTable:
    """A source tensor as rows and columns of numbers.

    Args:
        source: the tensor. A tensor in a file is read from there.
        recipe: says whether several numbers are packed in a byte.
        axes: the axes of the grown tensor.
        split: the number of leading axes that are rows.
    """

    def __init__(self, source: ir.TensorProtocol, recipe: Recipe, axes: Sequence[AxisIndex], split: int) -> None:
        self._axes, self._packed = axes, recipe.bits is not None
        self._fills = [next((fill for factor in axis for fill in fills_of(factor)), None) for axis in recipe.axes]
        """What stands behind the last source index of each axis; None for nothing."""
        self._sizes = [axis.source_size - (fill is not None) for axis, fill in zip(axes, self._fills, strict=True)]
        self._split = split
        self.height = math.prod(self._sizes[:split])
        self.width = math.prod(self._sizes[split:])
        self._grown_width = math.prod(axis.grown for axis in axes[split:])
        self.bits = recipe.bits or (source.dtype.bitwidth if source.dtype.bitwidth < 8 else None)
        """The bits of a number where a byte stores several numbers; else None."""
        self.type = np.dtype(source.dtype.numpy() if not self._packed else np.uint8)
        self.by_rows = all(self._whole_bytes(width) for width in (self.width, self._grown_width))
        """Whether every row of the source and of the grown tensor fills whole bytes."""
        self._stored = self._open(source)

    def _whole_bytes(self, elements: int) -> bool:
        return self.bits is None or self._packed or elements * self.bits % 8 == 0

    def _open(self, source: ir.TensorProtocol) -> StoredRows:
        if self.by_rows:
            return StoredRows(source, self.height, self._row_bytes(self.width, "source_size", self.type.itemsize))
        # Rows that begin inside a byte cannot be read by themselves. We unpack the whole tensor, one number to a byte.
        unpacked = ir.Tensor(np.ascontiguousarray(source.numpy()).view(np.uint8), name=source.name)
        return StoredRows(unpacked, self.height, self.width)

    def _row_bytes(self, elements: int, size: str, item: int) -> int:
        if self._packed and self._axes:
            last = int(getattr(self._axes[-1], size))
            return elements // max(last, 1) * packed_width(last, self.bits or 8)
        return elements * self.bits // 8 if self.bits is not None else elements * item

    def grown_row_bytes(self, item: int) -> int:
        """The number of bytes in a row of the grown tensor; a number that is not packed has `item` bytes."""
        return self._row_bytes(self._grown_width, "grown", item)

    def read(self, first: int, count: int, start: int, length: int, scratch: Scratch) -> Array:
        """Columns [start, start + length) of source rows [first, first + count).

        Where an axis has a fill, it is one longer than the source's, and its last index is the mean, or zero.

        Returns:
            shape (count, length), one number to an element: of the type `type`, or float64 where an axis has a fill.

        Raises:
            BadModel: see `StoredRows.read`.
        """
        if not any(self._fills):
            return self._read(first, count, start, length, scratch)
        plain = min(count, max(0, self.height - first)) if any(self._fills[: self._split]) else count
        parts = [self._widened(self._read(first, plain, 0, self.width, scratch))] if plain else []
        if plain < count:
            parts.append(self._widened(self._last_row))
        return np.concatenate(parts)[:, start : start + length]

    @cached_property
    def _last_row(self) -> Array:
        """The row behind the last source row, shape (1, width)."""
        total, scratch = np.zeros((1, self.width)), Scratch()
        if self._fills[0] == "mean":
            step = max(1, ROWS // max(1, self.width))
            for first in range(0, self.height, step):
                rows = self._read(first, min(step, self.height - first), 0, self.width, scratch)
                total += rows.astype(np.float64).sum(axis=0)
        return total / max(self.height, 1)

    def _widened(self, rows: Array) -> Array:
        """Rows with the last index of each axis of columns that has a fill, in float64."""
        table = rows.astype(np.float64).reshape(len(rows), *self._sizes[self._split :])
        for axis, fill in enumerate(self._fills[self._split :], 1):
            if fill is not None:
                mean = table.mean(axis=axis, keepdims=True)
                table = np.concatenate([table, mean if fill == "mean" else np.zeros_like(mean)], axis=axis)
        return table.reshape(len(rows), -1)

    def _read(self, first: int, count: int, start: int, length: int, scratch: Scratch) -> Array:
        """Columns of source rows, as they are stored."""
        if self.bits is None or not self.by_rows:
            item = self.type.itemsize
            return self._stored.read_part(first, count, start * item, length * item, scratch).view(self.type)
        packed = self._stored.read(first, count, scratch)
        last = self._axes[-1].source_size if self._packed and self._axes else self.width
        numbers = unpack(packed, (count * (self.width // max(last, 1)), last), self.bits).reshape(count, self.width)
        return numbers[:, start : start + length].view(self.type)
