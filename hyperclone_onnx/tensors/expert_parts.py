"""A part of a stored tensor, for one expert: some of the hidden units of a feed-forward block, times a number.

Any bytes are computed without the rest, so that the experts of a large block are streamed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Part:
    """What is taken from a tensor, which is seen as a table of the shape (rows, of, run).

    Args:
        shape: the shape of the part.
        number: the number of the column that is taken.
        of: the number of columns.
        run: the number of elements in a column.
        scale: multiplies each element.
    """

    shape: tuple[int, ...]
    number: int = 0
    of: int = 1
    run: int = 1
    scale: float = 1.0


@dataclass(frozen=True)
class Stacking:
    """How the tensor of all experts was stacked from parts of a dense tensor.

    Args:
        copies: how often each part stands in the stack.
        parts: the number of parts that the dense tensor was cut into. They stand side by side in the stack.
        run: the number of elements in a column of a part; see `Part`.
        scale: multiplies each element.
    """

    copies: int = 1
    parts: int = 1
    run: int = 1
    scale: float = 1.0

    def undone(self, stack: Array) -> Array:
        """The dense tensor's numbers, flat and in float64: the mean over the copies."""
        table = stack.astype(np.float64).reshape(self.copies, self.parts, -1, self.run).mean(axis=0)
        return np.ascontiguousarray(np.swapaxes(table, 0, 1)).reshape(-1) / self.scale

    def done(self, dense: Array) -> Array:
        """The stack's numbers of a dense tensor, flat and in float64."""
        table = dense.astype(np.float64).reshape(-1, self.parts, self.run)
        one = np.ascontiguousarray(np.swapaxes(table, 0, 1)).reshape(-1) * self.scale
        return np.tile(one, self.copies)


class PartTensor(ir.LazyTensor):
    """A part of a tensor. See `Part`.

    Args:
        source: the tensor.
        part: what is taken from it.

    Raises:
        ValueError: the tensor does not have such a part.
    """

    def __init__(self, source: ir.TensorProtocol, part: Part) -> None:
        if source.size != math.prod(part.shape) * part.of or math.prod(part.shape) % max(part.run, 1):
            raise ValueError(f"{source.name!r} of the shape {source.shape} has no part {part}")
        self.source, self.part = source, part
        self.rows = math.prod(part.shape) // max(part.run, 1)
        super().__init__(self._whole, dtype=source.dtype, shape=ir.Shape(part.shape), name=source.name)

    def _whole(self) -> ir.TensorProtocol:
        part = self.part
        table = self.source.numpy().reshape(self.rows, part.of, part.run)
        taken = np.ascontiguousarray(table[:, part.number]).reshape(part.shape)
        return ir.Tensor(scaled(taken, part.scale), dtype=self.source.dtype)


def scaled(numbers: Array, scale: float) -> Array:
    """Numbers times a number, rounded once to their type."""
    if scale == 1.0:
        return numbers
    result: Array = (numbers.astype(np.float64) * scale).astype(numbers.dtype)
    return result
