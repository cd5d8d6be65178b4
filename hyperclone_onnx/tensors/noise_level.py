"""The level of the noise on a tensor: the root mean square of its weights, lowered by the requested decibels."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.tensors.source_table import SourceTable

BLOCK = 1 << 16
"""The number of squares that are summed at a time."""

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
        step = max(1, BLOCK // max(1, self.source.width))
        for first in range(0, self.source.height if self.source.width else 0, step):
            rows = self.source.read(first, min(step, self.source.height - first), 0, self.source.width, scratch)
            squares = np.square(rows, out=scratch.array("squares", rows.shape, np.float64), dtype=np.float64)
            if not math.isfinite(summed := float(squares.sum())):
                squares = squares[np.isfinite(squares)]
                summed = float(squares.sum())
            total, counted = total + summed, counted + squares.size
        return total, counted

    @cached_property
    def value(self) -> float:
        """The standard deviation. The first use reads the whole source tensor."""
        total, counted = self._squares()
        if not counted:
            return 0.0
        mantissa, exponent = math.frexp(math.sqrt(total / counted))
        rounded = math.ldexp(round(mantissa * STEPS) / STEPS, exponent)
        return float(rounded * 10.0 ** (-self.snr_db / 20.0))
