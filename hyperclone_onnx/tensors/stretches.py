"""Stretches of an axis along which nothing changes but the place, so that they are copied and computed whole."""

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
"""An axis of more stretches than this is indexed element by element, unless they are long."""
LONG = 512


@dataclass(frozen=True)
class Run:
    """Grown indices [start, start + length) that repeat consecutive source indices, all as the same repeat."""

    start: int
    length: int
    source: int
    collapsed: int
    number: int
    count: int
    other_number: int
    other_count: int

    def cut(self, block: int, place: int) -> Iterator[Run]:
        """Pieces that end at multiples of `block`, this run beginning at `place`."""
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
    """The axis as runs, in order."""
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
                int(each[start])
                for each in (
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
    """Columns of a table by their indices: slices where the indices run on, one by one otherwise."""

    def __init__(self, index: Indices) -> None:
        bounds = [0, *(np.flatnonzero(np.diff(index) != 1) + 1).tolist(), len(index)]
        few = len(index) > 0 and (len(bounds) - 1 <= MANY or len(index) >= LONG * (len(bounds) - 1))
        self.index = index
        self.slices: list[tuple[int, int, int]] | None = None
        """(first column made, first column taken, how many)"""
        if few:
            self.slices = [(a, int(index[a]), b - a) for a, b in itertools.pairwise(bounds)]

    @property
    def whole(self) -> bool:
        """Whether it is one slice."""
        return self.slices is not None and len(self.slices) == 1

    def view(self, table: Array) -> Array | None:
        """The columns as a view, where they are one slice."""
        if self.slices is None or len(self.slices) != 1:
            return None
        _, first, length = self.slices[0]
        return table[:, first : first + length]

    def into(self, table: Array, out: Array) -> Array:
        """Copy the columns, converted to `out`'s type; returns `out`."""
        if self.slices is not None:
            for to, first, length in self.slices:
                out[:, to : to + length] = table[:, first : first + length]
        elif table.dtype == out.dtype and out.flags.c_contiguous:
            np.take(table, self.index, axis=1, out=out, mode="clip")
        else:
            out[...] = table[:, self.index]
        return out


def one_if_constant(array: Indices) -> Indices | int:
    """A number in place of many equal ones."""
    if array.size and (array == array[0]).all():
        return int(array[0])
    return array


def stretches(chosen: Any) -> list[tuple[slice, bool]] | None:
    """Columns by whether they are chosen, shape (columns,) or one for all: in slices; None where they are many.

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
