"""How large the noise on a tensor is: its weights' root mean square, less the decibels that were asked for."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.tensors.source_table import SourceTable

BLOCK = 1 << 16
"""So many squares are added up at once."""

STEPS = 1 << 13
"""The level is rounded to so many steps, so that the order in which squares are added up does not show."""


class NoiseLevel:
    """The noise's standard deviation for a weight that is not divided: rms(W) * 10 ** (-snr / 20).

    Numbers that are not finite are left out.
    """

    def __init__(self, source: SourceTable, snr_db: float) -> None:
        self.source, self.snr_db = source, snr_db

    def _squares(self) -> tuple[float, int]:
        """The sum of the squares, and how many there are."""
        scratch, total, counted = Scratch(), 0.0, 0
        step = max(1, BLOCK // max(1, self.source.width))
        for first in range(0, self.source.height if self.source.width else 0, step):
            found = self.source.read(first, min(step, self.source.height - first), 0, self.source.width, scratch)
            part = np.square(found, out=scratch.array("squares", found.shape, np.float64), dtype=np.float64)
            if not math.isfinite(summed := float(part.sum())):
                part = part[np.isfinite(part)]
                summed = float(part.sum())
            total, counted = total + summed, counted + part.size
        return total, counted

    @cached_property
    def value(self) -> float:
        """The level; the source is read for it, once."""
        total, counted = self._squares()
        if not counted:
            return 0.0
        mantissa, exponent = math.frexp(math.sqrt(total / counted))
        rounded = math.ldexp(round(mantissa * STEPS) / STEPS, exponent)
        return float(rounded * 10.0 ** (-self.snr_db / 20.0))
