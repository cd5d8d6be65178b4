"""How the repeats of a contraction share a weight: the one thing in which cloning methods differ.

A contraction keeps the function exactly when, for each source row i and each grown column o, the shares of the
repeats of i add up to the source weight: sum over j in m^-1(i) of W'[j, o] = W[i, m(o)]. HyperCloning's variants
(Samragh et al., arXiv 2409.12903, section 3), Net2Net and bert2BERT's FPI are choices of the shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

StrategyName = Literal["symmetric", "diagonal", "noisy-symmetric", "noisy-diagonal"]
STRATEGIES: tuple[StrategyName, ...] = ("symmetric", "diagonal", "noisy-symmetric", "noisy-diagonal")


LOWEST_SNR_DB, HIGHEST_SNR_DB = -10.0, 200.0
"""Noise any stronger drowns the weights it is added to in rounding."""


@dataclass(frozen=True)
class Strategy:
    """A way to share: symmetric gives each of n repeats 1/n; diagonal gives all of it to one repeat.

    The noisy ones add noise that sums to zero over the repeats. `snr_db` is the ratio, in decibels, of the
    power of the shared weights to the power of the noise; `seed` draws it.
    """

    name: StrategyName = "noisy-diagonal"
    snr_db: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise ValueError(f"no strategy {self.name!r}: it is one of {', '.join(STRATEGIES)}")
        if not LOWEST_SNR_DB <= self.snr_db <= HIGHEST_SNR_DB:
            raise ValueError(f"an SNR of {self.snr_db} dB: it lies between {LOWEST_SNR_DB:g} and {HIGHEST_SNR_DB:g}")

    @property
    def diagonal(self) -> bool:
        """Whether one repeat takes the whole weight."""
        return self.name.endswith("diagonal")

    @property
    def noisy(self) -> bool:
        """Whether zero-sum noise is added."""
        return self.name.startswith("noisy")

    def to_json(self) -> dict[str, Any]:
        """The strategy as plain data."""
        return {"name": self.name, "snr_db": self.snr_db, "seed": self.seed}
