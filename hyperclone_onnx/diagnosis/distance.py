"""The distance of clones, computed from two sums of squares, which can be added over blocks and over tensors.

The vector w_j is a clone of the source unit m(j), and mean_i is the mean of the clones of unit i. Then

    distance = sqrt( sum over j of |w_j - mean_m(j)|^2  /  sum over j of |w_j|^2 )

The distance is 0 if all clones of each unit are equal. It is sqrt(1 - 1/n) if the n clones of a unit are orthogonal and
of equal length (0.71 for two).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.plan.maps import Indices

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Spread:
    """The two sums of squares of a distance."""

    within: float = 0.0
    """The sum of squares of the clones' differences from the mean of their unit."""
    power: float = 0.0
    """The sum of squares of the clones themselves."""

    def __add__(self, other: Spread) -> Spread:
        return Spread(self.within + other.within, self.power + other.power)

    @property
    def distance(self) -> float | None:
        """The distance; None where all clones are zero, or there are no clones."""
        return math.sqrt(self.within / self.power) if self.power > 0.0 else None


def groups_of(source: Indices) -> list[Indices]:
    """The places of each unit's clones.

    Args:
        source: the unit of each place, shape (places,).

    Returns:
        For each number of clones that occurs, an array of shape (units, clones).
    """
    order = np.argsort(source, kind="stable")
    _, first, counts = np.unique(source[order], return_index=True, return_counts=True)
    return [order[first[counts == count][:, None] + np.arange(count)] for count in np.unique(counts)]


def joint(sources: Sequence[Indices]) -> Indices:
    """The source index of several axes that form one, outermost first. No axes form an axis of one index."""
    total = np.zeros(1, dtype=np.int64)
    for source in sources:
        size = int(source.max()) + 1 if len(source) else 0
        total = (total[:, None] * size + source[None, :]).reshape(-1)
    return total


def spread(clones: Array, power: float | None = None) -> Spread:
    """The spread of clones along the first axis. It is exactly 0 where they are equal.

    Args:
        clones: shape (clones, ...).
        power: the sum of squares of the clones, if it is known.
    """
    from_first = clones[1:] - clones[:1]
    within = squared(from_first)
    within -= (within if len(clones) == 2 else squared(from_first.sum(axis=0))) / len(clones)
    return Spread(max(0.0, within), squared(clones) if power is None else power)


def squared(array: Array) -> float:
    """The sum of squares. It is computed in this thread: callers have threads of their own."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return float(np.einsum("i,i->", flat, flat))


def spread_along(values: Array, source: Indices) -> Spread:
    """The spread of the clones along the last axis of an array. Values that are not finite count as zero.

    Args:
        values: shape (..., places).
        source: the unit of each place, shape (places,).
    """
    total = Spread()
    for group in groups_of(source):
        if group.shape[1] > 1:
            clones = np.moveaxis(values[..., group], -1, 0).astype(np.float64)
            total += spread(clones if np.isfinite(clones).all() else np.where(np.isfinite(clones), clones, 0.0))
    return total
