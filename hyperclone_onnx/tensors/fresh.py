"""Draws the numbers of a grown tensor that stand beside the source's own: a place is fresh if it is no first copy.

A number depends only on the seed, the name of the tensor and its place in the grown tensor (see `noise`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.tensors.noise import draw, quantiles
from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.tensors.shares import Columns
from hyperclone_onnx.tensors.stretches import Run

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Fresh:
    """Normally distributed numbers beside those of a source tensor.

    Args:
        key: the key of the numbers (see `noise.key_of`).
        mean: their mean.
        deviation: their standard deviation.
        work: the type in which they are computed.
    """

    key: int
    mean: float
    deviation: float
    work: type[np.floating[Any]]

    @cached_property
    def _table(self) -> Array:
        table: Array = quantiles().astype(self.work) * self.work(self.deviation) + self.work(self.mean)
        return table

    def beside(self, values: Array, run: Run, columns: Columns, scratch: Scratch) -> Array:
        """The rows of a run, where only first copies of rows and columns are the source's.

        Args:
            values: the source's numbers in all columns, shape (run.length, columns.size).
            run: the rows, none of whose repeats share anything.
            columns: the columns, none of whose repeats share anything.
            scratch: holds the working arrays.

        Returns:
            shape (run.length, columns.size), valid until the next call.
        """
        window = columns.low, columns.high - columns.low
        rows = draw(self.key, columns.width, (run.collapsed, run.length), window, scratch, self._table)
        out = columns.drawn.into(rows, scratch.array("fresh", values.shape, self.work))
        if run.other_number == 0:
            copied = np.broadcast_to(np.equal(columns.other_number, 0), values.shape)
            np.copyto(out, values, where=copied, casting="unsafe")
        return out
