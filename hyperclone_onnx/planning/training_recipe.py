"""How to train a grown model on: what was found to work, in two lines, and as data for a manifest.

The evidence is in docs/growth.md, measured at factor 2. Rates are told relative to the source's own, because those a
user knows.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from hyperclone_onnx.plan.plans import Plan


@dataclass(frozen=True)
class TrainingRecipe:
    """What to begin with, for AdamW."""

    peak_rate: float
    """In parts of the source's peak rate, if that was let down to about 0 in the end."""
    peak_rate_unannealed: float
    """In parts of the source's last rate, if it never was let down."""
    warm_up: float
    """The share of all steps in which the rate rises."""
    decay: str
    """How it falls, down to 0 at the end."""
    evidence: str = "docs/growth.md"

    def lines(self) -> tuple[str, str]:
        """The same in words."""
        warm_up = f"{self.warm_up:.0%} warm-up" if self.warm_up else "no warm-up"
        return (
            f"train on: AdamW from {self.peak_rate:g} of the source's peak rate ({self.peak_rate_unannealed:g} of its "
            f"last rate if that was never let down), {warm_up}, {self.decay} decay to 0",
            "sweep the rate by 2 both ways; the optimizer's state may start anew or come along; evidence: "
            f"{self.evidence}",
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


RECIPE = TrainingRecipe(peak_rate=0.2, peak_rate_unannealed=0.5, warm_up=0.0, decay="linear")
"""The best of docs/growth.md."""


def fan_in_growth(plan: Plan, name: str) -> float:
    """By how much the sums grew that a tensor of the grown model is a factor in; 1 for one that is in none.

    By muP, Adam's rate for a matrix falls as that grows (Yang et al., arXiv 2203.03466, table 3).
    """
    recipe = plan.tensors.get(name)
    if recipe is None:
        return 1.0
    axes = recipe.index(plan.maps)
    return math.prod(axis.grown / axis.collapsed_size for axis in axes if axis.collapsed_size)
