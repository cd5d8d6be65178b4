"""The recommended recipe for the further training of a grown model, as lines of text and as data for a manifest.

The evidence is in docs/growth.md, measured at factor 2. The learning rates are relative to those of the source's
training, because the user knows those.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from hyperclone_onnx.plan.plans import Plan


@dataclass(frozen=True)
class TrainingRecipe:
    """The first settings to try, for AdamW."""

    peak_rate: float
    """The peak learning rate, divided by the source's peak rate, if the source's rate fell to about 0 in the end."""
    peak_rate_unannealed: float
    """The peak learning rate, divided by the source's last rate, if the source's rate never fell."""
    warm_up: float
    """The share of all steps in which the learning rate rises, from 0 to 1."""
    decay: str
    """The form in which the learning rate falls to 0 at the end."""
    rate_of_each_tensor: float = 0.5
    """The learning rate for `adamw_groups`, divided by the source's last rate, if the source's rate never fell."""
    evidence: str = "docs/growth.md"
    """The page with the measurements."""
    new_data_decay: str = "cosine"
    """The form in which the learning rate falls from the source's last rate, if new or better data is read."""
    new_data_evidence: str = "Parmar et al., arXiv 2407.07263"
    """The paper about training with new data. It trained models that were not grown."""
    exact_evidence: str = "docs/optimizer_state.md"
    """The page about settings for each tensor, with which a grown model goes on as its source would."""

    def lines(self) -> tuple[str, ...]:
        """The recipe as lines of text."""
        warm_up = f"{self.warm_up:.0%} warm-up" if self.warm_up else "no warm-up"
        return (
            f"to train it further: AdamW with {self.peak_rate:g} of the source's peak learning rate "
            f"({self.peak_rate_unannealed:g} of its last rate if that rate never fell), {warm_up}, "
            f"{self.decay} decay to 0",
            "also try half and twice this rate; the optimizer's state may be new, or grown from the source's; "
            f"evidence: {self.evidence}",
            f"better, if the source's rate never fell: {self.rate_of_each_tensor:g} of it, for each tensor by "
            f"adamw_groups, with the grown state: the loss does not jump; evidence: {self.exact_evidence}",
            "with new or better data: begin with data like the source's, then change to the better data; the rate "
            f"falls from the source's last rate ({self.new_data_decay}); not measured on grown models; evidence: "
            f"{self.new_data_evidence}",
        )

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain data."""
        return asdict(self)


RECIPE = TrainingRecipe(peak_rate=0.2, peak_rate_unannealed=0.5, warm_up=0.0, decay="linear")
"""The recipe with the best results in docs/growth.md."""


def fan_in_growth(plan: Plan, name: str) -> float:
    """The factor by which the fan-in of a tensor grew: the number of products that are summed to one output.

    In muP, Adam's learning rate for a matrix is divided by this factor (Yang et al., arXiv 2203.03466, table 3).

    Args:
        plan: the plan of the grown model.
        name: the name of the tensor in the grown model.

    Returns:
        The factor; 1 for a tensor over which nothing is summed, and for one that did not grow.
    """
    recipe = plan.tensors.get(name)
    if recipe is None:
        return 1.0
    axes = recipe.index(plan.maps)
    return math.prod(axis.grown / axis.collapsed_size for axis in axes if axis.collapsed_size)
