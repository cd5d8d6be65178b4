"""The settings with which a grown model goes on as its source would, for each tensor and optimizer.

A plan makes each grown tensor from its source: theta'[j] = scale * share[j] * theta[m(j)]; see `optimizer.moments`
for the gradients. Of one element of the source, let m be the number of repeats among which the weight is shared, and n
the number of the other repeats, which copy it. Where repeats are equal (share = 1 / m),

    theta' = a * theta    with a = scale / m,
    g'     = b * g        with b = 1 / (scale * n).

If each step of the small model is d = -rate * f(g, theta), the grown model's step must be a * d. Every optimizer below
gets settings that make it so. For SGD, f is linear in g; Adam divides g by its size; Muon makes the singular values of
g equal, and those of m * n copies of a matrix are sqrt(m * n) times as large.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from hyperclone_onnx.plan.maps import fills_of
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.planning.experts import mixtures
from hyperclone_onnx.planning.training_recipe import fan_in_growth
from hyperclone_onnx.transforms.layers import deepened


@dataclass(frozen=True)
class Continuation:
    """How the numbers and the gradient of one tensor follow from those of its source tensor.

    Args:
        weight: a, the factor of the numbers, without its sign. Where elements have different factors, their mean.
        gradient: b, the factor of the gradient, without its sign. Where elements have different factors, their mean.
        fan_in: the factor by which the fan-in grew; see `training_recipe.fan_in_growth`.
        tensors: how many tensors of the grown model the source tensor became (a tied embedding that was untied). They
            have equal parts in its gradient.
        shapes: the shapes of the source tensor and of the grown one; None where they are equal.
        reason: why the tensor does not follow its source exactly; empty if it does. Its settings are then means.
    """

    weight: float = 1.0
    gradient: float = 1.0
    fan_in: float = 1.0
    tensors: int = 1
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    reason: str = ""

    @property
    def exact(self) -> bool:
        """Whether the tensor follows its source exactly."""
        return not self.reason

    @property
    def copies(self) -> float:
        """M * n, the number of elements of this tensor for one element of the source; where they differ, the mean."""
        if self.shapes is None:
            return 1.0
        small, big = map(math.prod, self.shapes)
        return big / small if small else 1.0

    @property
    def norm(self) -> float:
        """The factor of the squared gradients with which their sum is that of the source's squared gradients."""
        return 1.0 / (self.gradient**2 * self.copies * self.tensors)

    def to_json(self) -> dict[str, Any]:
        """What differs from a tensor that growth does not change, as plain data for the manifest of a handoff."""
        return {name: value for name, value in asdict(self).items() if value != getattr(_SAME, name)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Continuation:
        """The inverse of `to_json`."""
        shapes = data.get("shapes")
        pair = None if shapes is None else (tuple(shapes[0]), tuple(shapes[1]))
        return Continuation(**{**data, "shapes": pair})


def composed(first: Continuation, then: Continuation) -> Continuation:
    """How a tensor follows its first source, if it followed another one, `first`, until its latest growth, `then`."""
    shapes = then.shapes
    if first.shapes is not None:
        shapes = (first.shapes[0], first.shapes[1] if then.shapes is None else then.shapes[1])
    return Continuation(
        first.weight * then.weight,
        first.gradient * then.gradient,
        first.fan_in * then.fan_in,
        first.tensors * then.tensors,
        shapes,
        first.reason or then.reason,
    )


_SAME = Continuation()
"""A tensor that growth does not change."""


@dataclass(frozen=True)
class AdamWFactors:
    """Factors for AdamW's settings: of the learning rate, of eps, and of the (decoupled) weight decay."""

    rate: float
    eps: float
    weight_decay: float


Parametrisation = Literal["exact", "mup"]
"""How AdamW's settings follow: those that repeat the source's training, or those of muP."""


def adamw_factors(tensor: Continuation, parametrisation: Parametrisation = "exact") -> AdamWFactors:
    """AdamW. Its step m / (sqrt(v) + eps) is that of the source if eps changes as the gradient does.

    Args:
        tensor: the tensor.
        parametrisation: "exact", or "mup": the rate is divided by the growth of the fan-in, the decay (rate times
            weight decay) stays, and eps stays (Yang et al., arXiv 2203.03466, table 3).
    """
    if parametrisation == "mup":
        return AdamWFactors(1.0 / tensor.fan_in, 1.0, tensor.fan_in)
    return AdamWFactors(tensor.weight, tensor.gradient, 1.0 / tensor.weight)


@dataclass(frozen=True)
class SGDFactors:
    """Factors for the settings of SGD: of the learning rate, and of the weight decay that is added to the gradient."""

    rate: float
    weight_decay: float


def sgd_factors(tensor: Continuation) -> SGDFactors:
    """SGD, with or without momentum. The step is linear in the gradient, and so is the momentum."""
    return SGDFactors(tensor.weight / tensor.gradient, tensor.gradient / tensor.weight)


@dataclass(frozen=True)
class MuonFactors:
    """Factors for Muon's settings: of the learning rate, and of the (decoupled) weight decay."""

    rate: float
    weight_decay: float


def muon_factors(tensor: Continuation, adjust: str | None) -> MuonFactors:
    """Muon for matrices (Jordan et al., 2024). Its step is the gradient with all singular values made equal.

    Args:
        tensor: the matrix.
        adjust: the optimizer's own factor for a matrix's shape, as ``torch.optim.Muon`` calls it: "original" (the
            default), sqrt(max(1, rows / columns)), or "match_rms_adamw", 0.2 * sqrt(max(rows, columns)).
    """
    own = 1.0
    if tensor.shapes is not None:
        small, big = tensor.shapes
        own = _shape_factor(small, adjust) / _shape_factor(big, adjust)
    rate = tensor.weight * math.sqrt(tensor.copies) * own
    return MuonFactors(rate, 1.0 / rate)


def _shape_factor(shape: tuple[int, ...], adjust: str | None) -> float:
    rows, columns = shape
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


@dataclass(frozen=True)
class AdafactorFactors:
    """Factors for Adafactor's settings: of eps1, the least size of a gradient, and of eps2, that of a weight.

    Adafactor's rate is relative to the size of the weights, so the rate and the decay need no factor.
    """

    eps1: float
    eps2: float


def adafactor_factors(tensor: Continuation) -> AdafactorFactors:
    """Adafactor with rates relative to the weights' root mean square (Shazeer and Stern, arXiv 1804.04235)."""
    return AdafactorFactors(tensor.gradient, tensor.weight)


def continuations(plan: Plan | None, names: Iterable[str]) -> dict[str, Continuation]:
    """How tensors of the grown model follow the source, by name.

    Args:
        plan: the plan that grew the model; None for a model that was not grown, in which all factors are 1.
        names: initializers of the grown model.
    """
    if plan is None:
        return {name: Continuation() for name in names}
    parts = separated(plan)
    deeper = "the model has more layers than its source" if deepened(plan.transforms) else ""
    deeper = "the model has experts, which its source has not" if mixtures(plan.transforms) else deeper
    result = {}
    for name in names:
        recipe = plan.tensors.get(name)
        if recipe is None:
            number = parts.get(name, 1)
            result[name] = Continuation(gradient=1.0 / number, tensors=number, reason=deeper)
        else:
            number = parts.get(recipe.source, 1) if isinstance(recipe.origin, str) else 1
            result[name] = _of_recipe(plan, name, recipe, number, deeper)
    return result


def _of_recipe(plan: Plan, name: str, recipe: Recipe, number: int, reason: str) -> Continuation:
    scale = abs(recipe.scale) or 1.0
    weight, gradient = scale, 1.0 / (scale * number)
    small, big = [], []
    if not isinstance(recipe.origin, str):
        reason = reason or "its numbers do not come from one tensor of the source"
    elif not plan.strategy_of(name).law.is_even:
        reason = reason or "its repeats have different numbers"
    if any(fills_of(factor) for axis in recipe.axes for factor in axis):
        reason = reason or "some of its channels are no copies"
    for axis in recipe.index(plan.maps):
        small.append(axis.source_size)
        big.append(axis.grown)
        if not axis.grown:
            continue
        stretch = np.ones(axis.grown) if axis.stretch is None else axis.stretch
        uneven = any(values.min() != values.max() for values in (axis.count, axis.other_count, stretch))
        if uneven:
            reason = reason or "its elements are repeated unequally"
        weight *= float(np.mean(stretch / axis.count))
        gradient *= float(np.mean(1.0 / (stretch * axis.other_count)))
    shapes = None if small == big else (tuple(small), tuple(big))
    return Continuation(weight, gradient, fan_in_growth(plan, name), number, shapes, reason)


def separated(plan: Plan) -> dict[str, int]:
    """Return the source tensors that became several tensors of the grown model, with the number of these tensors."""
    counts = Counter(recipe.source for recipe in plan.tensors.values() if isinstance(recipe.origin, str))
    totals = {source: count + (source not in plan.tensors) for source, count in counts.items()}
    return {source: count for source, count in totals.items() if count > 1}
