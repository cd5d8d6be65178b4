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
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.maps import Indices

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


@dataclass(frozen=True)
class Units:
    """Which indices of an axis are clones of one another: those with the same source index, shape (grown,)."""

    source: Indices

    @cached_property
    def groups(self) -> list[Indices]:
        """The indices of each unit's clones: for each number of clones, an array of shape (units, clones)."""
        order = np.argsort(self.source, kind="stable")
        _, first, counts = np.unique(self.source[order], return_index=True, return_counts=True)
        return [
            order[first[counts == count][:, None] + np.arange(count)].astype(np.int64) for count in np.unique(counts)
        ]

    @property
    def repeats(self) -> bool:
        """Whether any unit has more than one clone."""
        return any(group.shape[1] > 1 for group in self.groups)

    @property
    def clones(self) -> int:
        """The most clones that a unit has."""
        return max((group.shape[1] for group in self.groups), default=1)

    @property
    def count(self) -> int:
        """How many units there are."""
        return sum(len(group) for group in self.groups)


def joint(sources: Sequence[Indices]) -> Indices:
    """The source index of several axes taken as one, outermost first; of no axis, that of a single index."""
    total = np.zeros(1, dtype=np.int64)
    for source in sources:
        size = int(source.max()) + 1 if len(source) else 0
        total = (total[:, None] * size + source[None, :]).reshape(-1)
    return total


def spread(clones: Array) -> Spread:
    """The spread over the last axis, which numbers the clones of a unit: exactly 0 where they are the same."""
    from_first = clones - clones[..., :1]
    apart = from_first - from_first.mean(axis=-1, keepdims=True)
    return Spread(float(np.square(apart).sum()), float(np.square(clones).sum()))


def spread_along(values: Array, units: Units) -> Spread:
    """The spread of the clones along the last axis of an array; what is not finite counts as zero."""
    total = Spread()
    for group in units.groups:
        if group.shape[1] > 1:
            clones = values[..., group].astype(np.float64)
            total += spread(clones if np.isfinite(clones).all() else np.where(np.isfinite(clones), clones, 0.0))
    return total
