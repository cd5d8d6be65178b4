"""Reads a source tensor as rows and columns, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.plan.maps import AxisIndex
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.tensors.packing import packed_width, unpack
from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.tensors.stored_rows import StoredRows

Array = npt.NDArray[Any]


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
        self.height = math.prod(axis.source_size for axis in axes[:split])
        self.width = math.prod(axis.source_size for axis in axes[split:])
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

        Returns:
            shape (count, length), one number to an element, of the type `type`.

        Raises:
            BadModel: see `StoredRows.read`.
        """
        if self.bits is None or not self.by_rows:
            item = self.type.itemsize
            return self._stored.read_part(first, count, start * item, length * item, scratch).view(self.type)
        packed = self._stored.read(first, count, scratch)
        last = self._axes[-1].source_size if self._packed and self._axes else self.width
        numbers = unpack(packed, (count * (self.width // max(last, 1)), last), self.bits).reshape(count, self.width)
        return numbers[:, start : start + length].view(self.type)
