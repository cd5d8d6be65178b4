"""How far clones are apart: sums of squares that add up, over blocks of a tensor as over tensors.

For vectors w_j, each a clone of the source unit m(j), with mean_i over the clones of unit i,

    distance = sqrt( sum over j of |w_j - mean_m(j)|^2  /  sum over j of |w_j|^2 )

which is 0 where all clones of each unit are the same, and sqrt(1 - 1/n) where the n clones of a unit have nothing in
common (0.71 for two).
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
    """The two sums of squares that a distance is made of."""

    within: float = 0.0
    """Of the clones' differences from the mean of their unit."""
    power: float = 0.0
    """Of the clones themselves."""

    def __add__(self, other: Spread) -> Spread:
        return Spread(self.within + other.within, self.power + other.power)

    @property
    def distance(self) -> float | None:
        """The relative distance; None where all clones are zero, or there are none."""
        return math.sqrt(self.within / self.power) if self.power > 0.0 else None


def groups_of(source: Indices) -> list[Indices]:
    """The places of each unit's clones: for each number of clones, an array of shape (units, clones).

    Args:
        source: the unit of each place.
    """
    order = np.argsort(source, kind="stable")
    _, first, counts = np.unique(source[order], return_index=True, return_counts=True)
    return [order[first[counts == count][:, None] + np.arange(count)] for count in np.unique(counts)]


def joint(sources: Sequence[Indices]) -> Indices:
    """The source index of several axes taken as one, outermost first; of no axis, that of a single index."""
    total = np.zeros(1, dtype=np.int64)
    for source in sources:
        size = int(source.max()) + 1 if len(source) else 0
        total = (total[:, None] * size + source[None, :]).reshape(-1)
    return total


def spread(clones: Array, power: float | None = None) -> Spread:
    """The spread over the first axis, which numbers the clones of a unit: exactly 0 where they are the same.

    Args:
        clones: shape (clones, ...).
        power: their sum of squares, where it is known.
    """
    from_first = clones[1:] - clones[:1]
    within = squared(from_first)
    within -= (within if len(clones) == 2 else squared(from_first.sum(axis=0))) / len(clones)
    return Spread(max(0.0, within), squared(clones) if power is None else power)


def squared(array: Array) -> float:
    """The sum of squares, by this thread alone."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return float(np.einsum("i,i->", flat, flat))


def spread_along(values: Array, source: Indices) -> Spread:
    """The spread of the clones along the last axis of an array; what is not finite counts as zero.

    Args:
        values: shape (..., places).
        source: the unit of each place.
    """
    total = Spread()
    for group in groups_of(source):
        if group.shape[1] > 1:
            clones = np.moveaxis(values[..., group], -1, 0).astype(np.float64)
            total += spread(clones if np.isfinite(clones).all() else np.where(np.isfinite(clones), clones, 0.0))
    return total
