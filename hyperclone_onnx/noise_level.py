"""How large the noise on a tensor is: its weights' root mean square, less the decibels that were asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property, partial

import numpy as np

from hyperclone_onnx.scratch import Scratch
from hyperclone_onnx.source_table import SourceTable

BLOCK = 1 << 17
"""So many squares are added up at once."""

PART = 1 << 20
"""So many are a part that one thread adds up."""

STEPS = 1 << 13
"""The level is rounded to so many steps, so that the order in which squares are added up does not show."""


class NoiseLevel:
    """The noise's standard deviation for a weight that is not divided: rms(W) * 10 ** (-snr / 20).

    Numbers that are not finite are left out.
    """

    def __init__(self, source: SourceTable, snr_db: float) -> None:
        self.source, self.snr_db = source, snr_db
        step = max(1, PART // max(1, source.width))
        rows = range(0, source.height if source.width else 0, step)
        self._parts = [(first, min(step, source.height - first)) for first in rows]
        self._squares: list[tuple[float, int] | None] = [None] * len(self._parts)

    def preparations(self) -> Iterator[Callable[[Scratch], None]]:
        """Add up the squares of each part, in any order, by any number of threads."""
        for index in range(len(self._parts)):
            yield partial(self._prepare, index)

    def _prepare(self, index: int, scratch: Scratch) -> None:
        self._add_up(index, scratch)

    def _add_up(self, index: int, scratch: Scratch) -> tuple[float, int]:
        """The sum of a part's squares, and how many there are."""
        done = self._squares[index]
        if done is None:
            first, count = self._parts[index]
            total, counted = 0.0, 0
            step = max(1, BLOCK // max(1, self.source.width))
            for start in range(first, first + count, step):
                size = min(step, first + count - start)
                found = self.source.read(start, size, 0, self.source.width, scratch)
                wide = scratch.array("squares", found.shape, np.float64)
                np.copyto(wide, found)
                part = np.square(wide, out=wide)
                if not math.isfinite(summed := float(part.sum())):
                    part = part[np.isfinite(part)]
                    summed = float(part.sum())
                total, counted = total + summed, counted + part.size
            done = self._squares[index] = (total, counted)
        return done

    @cached_property
    def value(self) -> float:
        """The level; what is not prepared is added up now."""
        scratch = Scratch()
        sums = [self._add_up(index, scratch) for index in range(len(self._parts))]
        counted = sum(count for _, count in sums)
        if not counted:
            return 0.0
        rms = math.sqrt(sum(total for total, _ in sums) / counted)
        mantissa, exponent = math.frexp(rms)
        rounded = math.ldexp(round(mantissa * STEPS) / STEPS, exponent)
        return float(rounded * 10.0 ** (-self.snr_db / 20.0))
