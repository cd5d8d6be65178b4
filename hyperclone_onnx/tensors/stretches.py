"""Divides an axis into stretches of consecutive indices, which are copied and computed as slices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.plan.maps import AxisIndex, Indices

Array = npt.NDArray[Any]

MANY = 64
"""With more stretches than this, an axis is indexed element by element, unless its stretches are long."""
LONG = 512
"""The mean length from which stretches are long: they are then copied as slices, however many they are."""


@dataclass(frozen=True)
class Run:
    """Grown indices [start, start + length), all of the same repeat, whose source indices are consecutive too.

    `number`, `count`, `other_number` and `other_count` are those of `AxisIndex`.
    """

    start: int
    length: int
    source: int
    """The first source index."""
    collapsed: int
    """The first collapsed index."""
    number: int
    count: int
    other_number: int
    other_count: int

    def cut(self, block: int, place: int) -> Iterator[Run]:
        """Cut the run into pieces that end at multiples of `block`, where the run begins at `place`."""
        done = 0
        while done < self.length:
            size = min(block - (place + done) % block, self.length - done)
            yield Run(
                self.start + done,
                size,
                self.source + done,
                self.collapsed + done,
                self.number,
                self.count,
                self.other_number,
                self.other_count,
            )
            done += size


def runs_of(axis: AxisIndex) -> list[Run]:
    """Divide an axis into runs, in order of their starts."""
    if axis.grown == 0:
        return []
    changes = (np.diff(axis.source) != 1) | (np.diff(axis.collapsed) != 1)
    for labels in (axis.number, axis.count, axis.other_number, axis.other_count):
        changes |= np.diff(labels) != 0
    bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), axis.grown]
    return [
        Run(
            start,
            end - start,
            *(
                int(indices[start])
                for indices in (
                    axis.source,
                    axis.collapsed,
                    axis.number,
                    axis.count,
                    axis.other_number,
                    axis.other_count,
                )
            ),
        )
        for start, end in itertools.pairwise(bounds)
    ]


class Pick:
    """Takes columns of a table by their indices: as slices where the indices form few stretches, else one by one."""

    def __init__(self, index: Indices) -> None:
        bounds = [0, *(np.flatnonzero(np.diff(index) != 1) + 1).tolist(), len(index)]
        few = len(index) > 0 and (len(bounds) - 1 <= MANY or len(index) >= LONG * (len(bounds) - 1))
        self.index = index
        self.slices: list[tuple[int, int, int]] | None = None
        """(first column of the result, first column of the table, number of columns)"""
        if few:
            self.slices = [(a, int(index[a]), b - a) for a, b in itertools.pairwise(bounds)]

    @property
    def whole(self) -> bool:
        """Whether the columns are one slice of the table."""
        return self.slices is not None and len(self.slices) == 1

    def view(self, table: Array) -> Array | None:
        """The columns as a view of the table; None where they are not one slice."""
        if self.slices is None or len(self.slices) != 1:
            return None
        _, first, length = self.slices[0]
        return table[:, first : first + length]

    def into(self, table: Array, out: Array) -> Array:
        """Copy the columns into `out`, converted to its type, and return it."""
        if self.slices is not None:
            for start, first, length in self.slices:
                out[:, start : start + length] = table[:, first : first + length]
        elif table.dtype == out.dtype and out.flags.c_contiguous:
            np.take(table, self.index, axis=1, out=out, mode="clip")
        else:
            out[...] = table[:, self.index]
        return out


def one_if_constant(array: Indices) -> Indices | int:
    """The one number that all elements of an array are equal to; else the array."""
    if array.size and (array == array[0]).all():
        return int(array[0])
    return array


def stretches(chosen: Any) -> list[tuple[slice, bool]] | None:
    """Slices of columns, and whether the columns of each slice are chosen.

    Args:
        chosen: booleans of shape (columns,), or one boolean for all columns.

    Returns:
        (slice, whether its columns are chosen), in order; None where there would be more than `MANY` slices.

    >>> stretches(np.array([True, True, False]))
    [(slice(0, 2, None), True), (slice(2, 3, None), False)]
    """
    chosen = np.asarray(chosen)
    if chosen.ndim == 0:
        return [(slice(None), bool(chosen))]
    bounds = [0, *(np.flatnonzero(np.diff(chosen)) + 1).tolist(), len(chosen)]
    if len(bounds) - 1 > MANY:
        return None
    return [(slice(start, end), bool(chosen[start])) for start, end in itertools.pairwise(bounds)]
