"""Strategies: how the repeats of a summed index share a weight. Methods of cloning differ only in this.

A contraction computes the same as before exactly if, for each source row i and each grown column o, the shares of the
repeats of i add up to the source weight: sum over j in m^-1(i) of W'[j, o] = W[i, m(o)]. HyperCloning's variants
(Samragh et al., arXiv 2409.12903, section 3), Net2Net and bert2BERT's FPI choose the shares in different ways.

A `Law` is one way to choose them. A `Strategy` is the name of a law with the parameters that a user gives. The plan
records the strategy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args

from hyperclone_onnx.plan.origins import Origin

if TYPE_CHECKING:  # the command line imports this module for the names of the laws: `--help` needs no numpy
    import numpy as np
    import numpy.typing as npt

Number: TypeAlias = "npt.NDArray[np.int64] | int"
"""One number for all columns, or one for each column."""

LOWEST_SNR_DB, HIGHEST_SNR_DB = -10.0, 200.0
"""The range of the signal-to-noise ratio, in decibels. With stronger noise, rounding would destroy the weights."""


class Law:
    """How the repeats of an index share a weight."""

    name: ClassVar[str]
    preserves: ClassVar[bool] = True
    """Whether the grown model computes the same as its source. Otherwise `expand` reports the difference only."""
    noisy: ClassVar[bool] = False
    """Whether noise is added that sums to zero over the repeats."""
    extra_from_next_layer: ClassVar[bool] = False
    """Whether the extra copies of a tensor's outputs come from the next layer's tensor of the same kind."""
    draws_the_rest: ClassVar[bool] = False
    """Whether a weight is there once, and all numbers beside it are drawn. Nothing is then shared or divided."""
    divides: ClassVar[bool] = True
    """Whether sums over grown axes are divided, by shares or by numbers."""
    shares_equally: ClassVar[bool]
    """Whether each of n repeats takes 1 / n of the weight. Otherwise `takes_whole` says which one takes all of it."""

    @property
    def adds_up(self) -> bool:
        """Whether the shares of a weight add up to it. A law that preserves the function has no choice."""
        return self.preserves

    @property
    def is_even(self) -> bool:
        """Whether all repeats get the same numbers."""
        return self.shares_equally and not self.noisy

    def takes_whole(self, number: int, count: Number, other: Number) -> Any:
        """Whether a repeat takes the whole weight; it takes nothing otherwise. A law that shares equally has none.

        Args:
            number: the number of the repeat, from 0.
            count: the number of repeats, one for all columns or one for each column.
            other: the number of the repeat in the axes that are not summed, in other words in the output.

        Returns:
            One boolean for all columns, or one for each column.
        """
        raise NotImplementedError(f"the law {self.name!r} shares unequally and does not say how")

    def noise_scale(self, count: int) -> float:
        """The standard deviation of the noise on one of `count` repeats, divided by that on a weight not divided.

        A law without noise has none.
        """
        raise NotImplementedError(f"the law {self.name!r} adds noise and does not say how much")

    def origin(self, tensor: str, names: Sequence[str]) -> Origin:
        """The origin of a grown tensor's numbers. Most laws grow the stored tensor itself.

        Args:
            tensor: the name of the stored tensor.
            names: the names of all stored tensors, in the order of the graph.
        """
        return tensor


class Symmetric(Law):
    """Each of n repeats takes 1 / n of the weight (HyperCloning's symmetric variant)."""

    name = "symmetric"
    shares_equally = True

    def noise_scale(self, count: int) -> float:
        """1 / n."""
        return 1.0 / count


class Diagonal(Law):
    """The repeat whose number equals the output's takes the whole weight (HyperCloning's diagonal variant)."""

    name = "diagonal"
    shares_equally = False

    def takes_whole(self, number: int, count: Number, other: Number) -> Any:
        """Where the two numbers are equal, modulo the number of repeats."""
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


class Fpi(Symmetric):
    """Function-preserving initialisation of bert2BERT (Chen et al., arXiv 2110.07143), which follows Net2Net.

    The extra units are chosen in turn and not at random. Then it is the symmetric law.
    """

    name = "fpi"


class Aki(Symmetric):
    """Advanced knowledge initialisation of bert2BERT: extra copies come from the next layer. It changes the function.

    Each repeat takes 1 / n of the weight along the inputs (see `planning.next_layers` for the outputs).
    """

    name = "aki"
    preserves = False
    extra_from_next_layer = True

    @property
    def adds_up(self) -> bool:
        """The shares of each tensor do; only some tensors stand beside others than in the source."""
        return True


class CopyFresh(Law):
    """The source stands in the first rows and columns of each weight; all other numbers are drawn anew.

    They are normally distributed with the mean and the standard deviation of the source tensor's numbers. This is how
    the training of a large model usually begins from a small one without cloning. It changes the function.
    """

    name = "copy-fresh"
    preserves = False
    draws_the_rest = True
    divides = False
    shares_equally = False

    @property
    def adds_up(self) -> bool:
        """There are no shares, so that every number of the file can be compared."""
        return True


class Selection(Law):
    """Some rows and columns of each weight, as they are (arXiv 2311.18823): for models that shrink."""

    name = "selection"
    preserves = False
    divides = False
    shares_equally = True

    @property
    def adds_up(self) -> bool:
        """There are no shares, so that every number of the file can be compared."""
        return True


_laws: dict[str, Law] = {}


def register(law: Law) -> Law:
    """Register a law by its name. A new strategy needs one class and one call of this function.

    Raises:
        ValueError: a law of that name is registered already.
    """
    if law.name in _laws:
        raise ValueError(f"there is a strategy {law.name!r} already")
    _laws[law.name] = law
    return law


for _law in (Symmetric(), Diagonal(), NoisySymmetric(), NoisyDiagonal(), Fpi(), Aki(), CopyFresh(), Selection()):
    register(_law)

StrategyName = Literal["symmetric", "diagonal", "noisy-symmetric", "noisy-diagonal"]
STRATEGIES: tuple[StrategyName, ...] = get_args(StrategyName)
"""HyperCloning's laws."""

OFFERED: tuple[str, ...] = (*STRATEGIES, "fpi", "aki", "copy-fresh")
"""The names that the command line offers: HyperCloning's laws, those of bert2BERT, and plain copying."""


@dataclass(frozen=True)
class Strategy:
    """How repeats share a weight: the name of a law and its parameters.

    Args:
        name: "symmetric" gives each of n repeats 1 / n of the weight. "diagonal" gives the whole weight to one repeat.
            "noisy-symmetric" and "noisy-diagonal" add noise that sums to zero over the repeats.
        snr_db: the ratio of the power of the shared weights to the power of the noise, in decibels.
        seed: the seed of the noise.

    Raises:
        ValueError: no law has that name, or `snr_db` is out of range.
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
        """The law of that name."""
        return _laws[self.name]

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Strategy:
        """The inverse of `to_json`."""
        return Strategy(data["name"], data["snr_db"], data["seed"])

    def to_json(self) -> dict[str, Any]:
        """The strategy as plain data."""
        return {"name": self.name, "snr_db": self.snr_db, "seed": self.seed}


@dataclass(frozen=True)
class StrategyRule:
    """Another strategy for some tensors. Exactly one of `role`, `dimension` and `tensor` says for which.

    Args:
        role: tensors whose repeats share a weight along a dimension of this role.
        dimension: tensors whose repeats share a weight along this dimension.
        tensor: a pattern of names of tensors, such as ``model.layers.*.mlp.*``.
        name: the name of the law.
        snr_db: the level of the noise.
        seed: the seed of the noise. What is None is as in the strategy of the whole model.
        place: where the rule is written, for messages.

    Raises:
        ValueError: not exactly one of the three is given.
    """

    role: str | None = None
    dimension: str | None = None
    tensor: str | None = None
    name: str | None = None
    snr_db: float | None = None
    seed: int | None = None
    place: str = ""

    def __post_init__(self) -> None:
        if sum(what is not None for what in (self.role, self.dimension, self.tensor)) != 1:
            raise ValueError("a rule is for a role, for a dimension or for tensors: give exactly one of the three")

    def strategy(self, default: Strategy) -> Strategy:
        """The strategy of the tensors that the rule is for."""
        return Strategy(
            default.name if self.name is None else self.name,
            default.snr_db if self.snr_db is None else self.snr_db,
            default.seed if self.seed is None else self.seed,
        )

    def to_json(self) -> dict[str, Any]:
        """The rule as plain data, without the place."""
        data = {
            "role": self.role,
            "dimension": self.dimension,
            "tensor": self.tensor,
            "strategy": self.name,
            "snr_db": self.snr_db,
            "seed": self.seed,
        }
        return {key: value for key, value in data.items() if value is not None}
