"""How to train a grown model on: what was found to work, in two lines, and as data for a manifest.

The figures are those of docs/growth.md. Rates are told relative to the source's own peak, because that is what a user
knows; by muP (Yang et al., arXiv 2203.03466) Adam's rate for a matrix falls as its fan-in grows.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from hyperclone_onnx.plan import Plan

GUIDE = "docs/growth.md"


@dataclass(frozen=True)
class TrainingRecipe:
    """What to begin with."""

    peak_rate: float
    """In parts of the peak rate that the source was trained with."""
    warm_up: float
    """The share of all steps in which the rate rises."""
    decay: str
    guide: str = GUIDE

    def lines(self) -> tuple[str, str]:
        """The same in words."""
        return (
            f"train on: AdamW from {self.peak_rate:.2g} of the source's peak rate, {self.warm_up:.0%} warm-up, "
            f"{self.decay}",
            f"carry the optimizer's state over (handoff --optimizer); sweep the rate; {self.guide} has the evidence",
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def training_recipe(plan: Plan) -> TrainingRecipe:
    """For a model grown by a plan: the peak falls with the growth of the fan-in of most weights."""
    growths = sorted(fan_in_growth(plan, name) for name, recipe in plan.tensors.items() if recipe.shared)
    middle = growths[len(growths) // 2] if growths else 1.0
    return TrainingRecipe(1.0 / middle, 0.02, "then a linear decay to 0")


def fan_in_growth(plan: Plan, name: str) -> float:
    """By how much the sums grew that a tensor of the grown model takes part in; 1 for all that is no factor of one."""
    recipe = plan.tensors.get(name)
    if recipe is None:
        return 1.0
    axes = recipe.index(plan.maps)
    return math.prod(axis.grown / axis.collapsed_size for axis in axes if axis.collapsed_size)
