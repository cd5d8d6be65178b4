"""The level of the noise on a tensor, and the mean and deviation of numbers that are drawn beside its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.tensors.source_table import SourceTable
from hyperclone_onnx.tensors.stored_rows import StoredRows

BLOCK = 1 << 16
"""The number of weights that are read at a time."""

SUMMED = 1 << 13
"""The numbers whose squares are summed at a time: so few that no library of linear algebra starts threads for them."""

STEPS = 1 << 13
"""The mantissa of the level is rounded to this number of steps.

The order of a sum changes its last digits. Rounding removes them, so that the level does not depend on the order.
"""


class NoiseLevel:
    """The standard deviation of the noise on a weight that is not divided: rms(W) * 10 ** (-snr_db / 20).

    Weights that are not finite do not count.

    Args:
        source: the rows of the source tensor.
        snr_db: the ratio of the power of the weights to the power of the noise, in decibels.
    """

    def __init__(self, source: SourceTable, snr_db: float) -> None:
        self.source, self.snr_db = source, snr_db

    def _squares(self) -> tuple[float, int]:
        """The sum of the squares of all finite weights, and the number of these weights."""
        scratch, total, counted = Scratch(), 0.0, 0
        for rows in _blocks(self.source, scratch):
            numbers = scratch.array("numbers", (rows.size,), np.float64)
            np.copyto(numbers.reshape(rows.shape), rows, casting="unsafe")
            if not math.isfinite(summed := power(numbers)):
                numbers = numbers[np.isfinite(numbers)]
                summed = power(numbers)
            total, counted = total + summed, counted + numbers.size
        return total, counted

    @cached_property
    def value(self) -> float:
        """The standard deviation. The first use reads the whole source tensor."""
        total, counted = self._squares()
        if not counted:
            return 0.0
        return float(_rounded(math.sqrt(total / counted)) * 10.0 ** (-self.snr_db / 20.0))


def mean_and_deviation(source: SourceTable) -> tuple[float, float]:
    """The mean and the standard deviation of all finite numbers of a tensor. The whole tensor is read."""
    return _mean_and_deviation(_blocks(source, Scratch()))


def mean_and_deviation_of(tensor: ir.TensorProtocol) -> tuple[float, float]:
    """The same of a stored tensor, of a type of at least 8 bits."""
    kind = np.dtype(tensor.dtype.numpy())
    rows, scratch = StoredRows(tensor, 1, tensor.nbytes), Scratch()
    step = BLOCK * kind.itemsize
    return _mean_and_deviation(
        rows.read_bytes(start, min(step, tensor.nbytes - start), scratch).view(kind)
        for start in range(0, tensor.nbytes, step)
    )


def _mean_and_deviation(blocks: Iterable[npt.NDArray[Any]]) -> tuple[float, float]:
    total, squares, counted = 0.0, 0.0, 0
    for rows in blocks:
        numbers = rows[np.isfinite(rows)].astype(np.float64)
        total, squares, counted = (
            total + float(numbers.sum()),
            squares + float(numbers @ numbers),
            counted + len(numbers),
        )
    if not counted:
        return 0.0, 0.0
    mean = total / counted
    variance = squares / counted - mean * mean
    # Rounding leaves a little of the variance of numbers that are all equal.
    deviation = math.sqrt(variance) if variance > 1e-12 * mean * mean else 0.0
    return _rounded(mean), _rounded(deviation)


def _blocks(source: SourceTable, scratch: Scratch) -> Iterator[npt.NDArray[Any]]:
    """All rows of a tensor, some at a time."""
    step = max(1, BLOCK // max(1, source.width))
    for first in range(0, source.height if source.width else 0, step):
        yield source.read(first, min(step, source.height - first), 0, source.width, scratch)


def power(numbers: npt.NDArray[Any]) -> float:
    """The sum of the squares of float64 numbers."""
    flat = numbers.reshape(-1)
    parts = (flat[start : start + SUMMED] for start in range(0, len(flat), SUMMED))
    return float(sum(float(np.dot(part, part)) for part in parts))


def _rounded(number: float) -> float:
    mantissa, exponent = math.frexp(number)
    return math.ldexp(round(mantissa * STEPS) / STEPS, exponent)
