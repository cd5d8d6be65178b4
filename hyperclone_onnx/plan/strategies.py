"""How the repeats of a contraction share a weight: the one thing in which cloning methods differ.

A contraction keeps the function exactly when, for each source row i and each grown column o, the shares of the
repeats of i add up to the source weight: sum over j in m^-1(i) of W'[j, o] = W[i, m(o)]. HyperCloning's variants
(Samragh et al., arXiv 2409.12903, section 3), Net2Net and bert2BERT's FPI are choices of the shares.

A `Law` is one such choice. A `Strategy` is the name of a law with the parameters that a user gives, as the plan has it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.plan.origins import Origin

Number = npt.NDArray[np.int64] | int
"""One number for all columns, or one for each column."""

LOWEST_SNR_DB, HIGHEST_SNR_DB = -10.0, 200.0
"""Noise any stronger drowns the weights it is added to in rounding."""


class Law(ABC):
    """How the repeats of an index share a weight."""

    name: ClassVar[str]
    preserves: ClassVar[bool] = True
    """Whether the grown model computes the source's function. Where it does not, the comparison is only reported."""
    noisy: ClassVar[bool] = False
    """Whether noise is added that sums to zero over the repeats."""
    shares_equally: ClassVar[bool]
    """Whether each of n repeats takes 1 / n of the weight. Otherwise `takes_whole` says which ones take all of it."""

    @property
    def is_even(self) -> bool:
        """Whether all repeats get the same numbers."""
        return self.shares_equally and not self.noisy

    @abstractmethod
    def takes_whole(self, number: int, count: Number, other: Number) -> Any:
        """Whether repeat `number` of `count` takes the whole weight, for each column; it takes nothing otherwise.

        `other` numbers the repeats of the axes that no contraction sums over: the grown output that a column feeds.
        """

    @abstractmethod
    def noise_scale(self, count: int) -> float:
        """The standard deviation of the noise on one of `count` repeats, over that for a weight that is not divided."""

    def origin(self, tensor: str, names: Sequence[str]) -> Origin:
        """The numbers that a grown tensor begins from, in the place of the stored `tensor`.

        Args:
            tensor: the stored tensor that would be grown.
            names: the names of all stored tensors, in the order of the graph.
        """
        return tensor


class Symmetric(Law):
    """Each of n repeats takes 1 / n."""

    name = "symmetric"
    shares_equally = True

    def takes_whole(self, number: int, count: Number, other: Number) -> Any:
        """Never."""
        return np.False_

    def noise_scale(self, count: int) -> float:
        """1 / n."""
        return 1.0 / count


class Diagonal(Law):
    """The repeat whose number matches the output's takes the whole weight (HyperCloning's diagonal variant)."""

    name = "diagonal"
    shares_equally = False

    def takes_whole(self, number: int, count: Number, other: Number) -> Any:
        """Where the numbers match, counted modulo the number of repeats."""
        return number == other % count

    def noise_scale(self, count: int) -> float:
        """1 / sqrt(n)."""
        return 1.0 / math.sqrt(count)


class NoisySymmetric(Symmetric):
    """Symmetric, with noise that sums to zero over the repeats."""

    name = "noisy-symmetric"
    noisy = True


class NoisyDiagonal(Diagonal):
    """Diagonal, with noise that sums to zero over the repeats."""

    name = "noisy-diagonal"
    noisy = True


_laws: dict[str, Law] = {}


def register(law: Law) -> Law:
    """Make a law known by its name; a new strategy is one class and one call of this.

    Raises:
        ValueError: there is one of that name.
    """
    if law.name in _laws:
        raise ValueError(f"there is a strategy {law.name!r} already")
    _laws[law.name] = law
    return law


for _law in (Symmetric(), Diagonal(), NoisySymmetric(), NoisyDiagonal()):
    register(_law)

StrategyName = Literal["symmetric", "diagonal", "noisy-symmetric", "noisy-diagonal"]
STRATEGIES: tuple[StrategyName, ...] = ("symmetric", "diagonal", "noisy-symmetric", "noisy-diagonal")
"""The names that the command line offers."""


@dataclass(frozen=True)
class Strategy:
    """A way to share: symmetric gives each of n repeats 1/n; diagonal gives all of it to one repeat.

    The noisy ones add noise that sums to zero over the repeats. `snr_db` is the ratio, in decibels, of the
    power of the shared weights to the power of the noise; `seed` draws it.

    Raises:
        ValueError: no law has that name, or `snr_db` is out of its range.
    """

    name: str = "noisy-diagonal"
    snr_db: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in _laws:
            raise ValueError(f"no strategy {self.name!r}: it is one of {', '.join(_laws)}")
        if not LOWEST_SNR_DB <= self.snr_db <= HIGHEST_SNR_DB:
            raise ValueError(f"an SNR of {self.snr_db} dB: it lies between {LOWEST_SNR_DB:g} and {HIGHEST_SNR_DB:g}")

    @property
    def law(self) -> Law:
        """How the repeats share a weight."""
        return _laws[self.name]

    def to_json(self) -> dict[str, Any]:
        """The strategy as plain data."""
        return {"name": self.name, "snr_db": self.snr_db, "seed": self.seed}
