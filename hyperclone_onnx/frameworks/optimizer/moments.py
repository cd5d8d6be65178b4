"""How an optimizer's state grows with its model: Adam's moments, and the steps that follow.

A plan makes each grown tensor linearly from its source: theta' = G theta, with
theta'[j] = scale * share[j] * theta[m(j)], the shares of one source element's repeats along the *shared* axes adding up
to 1. The grown model's loss at G theta is the small model's at theta, whatever theta is, so the chain rule gives

    g[i] = sum over the repeats j of i of (scale * share[j] * g'[j]).

Repeats along a shared axis read equal activations, so their gradients are equal with every strategy. Along the other
axes they are equal where the repeats are symmetric, and then

    g'[j] = g[m(j)] / (scale * n[j]),    n[j] the number of repeats of j along the axes that are not shared.

So the gradient grows by the dual of the recipe: what a weight shares the gradient copies, and what a weight copies the
gradient shares. Adam's first moment is a mean of gradients and grows alike, the second one is a mean of squares and
grows by the square. With noise or the diagonal strategy the formula is the mean over those repeats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import Array, StoredArray
from hyperclone_onnx.plan.maps import Maps
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.plan.strategies import Strategy
from hyperclone_onnx.tensors.grown_tensor import GrownTensor


@dataclass(frozen=True)
class Moments:
    """Adam's state of one tensor: running means of its gradient and of the gradient's square, and the steps taken."""

    first: StoredArray
    second: StoredArray
    step: float


@dataclass(frozen=True)
class GrownMoments:
    """The same of a grown tensor, not yet computed."""

    first: GrownMoment
    second: GrownMoment
    step: float


class GrownMoment:
    """A moment of a grown tensor, of which any slice can be had.

    Args:
        source: the moment of the source tensor.
        recipe: how the grown tensor is made; None where it is the source tensor.
        maps: the source map of each named dimension.
        power: 1 for a mean of gradients, 2 for a mean of their squares.
        tensors: how many tensors of the grown model the source tensor became; each is taken to have an equal part in
            its gradient.
    """

    def __init__(self, source: StoredArray, recipe: Recipe | None, maps: Maps, power: int, tensors: int = 1) -> None:
        self.dtype: np.dtype[Any] = np.dtype(np.float64 if source.dtype == np.float64 else np.float32)
        self.power = power
        self.scale = (1.0 if recipe is None else recipe.scale) * tensors
        self.source = source
        axes = () if recipe is None else recipe.index(maps)
        self.shape = source.shape if recipe is None else tuple(axis.grown for axis in axes)
        self.counts = [axis.other_count for axis in axes]
        self.copies = None if recipe is None else (replace(recipe, shared=(), scale=1.0), maps)

    def __getitem__(self, windows: slice | tuple[slice, ...]) -> Array:
        """A slice: one slice with step 1 for each leading axis."""
        windows = windows if isinstance(windows, tuple) else (windows,)
        values = np.asarray(_repeated(self)[windows], dtype=self.dtype) / self.dtype.type(self.scale**self.power)
        for axis, counts in enumerate(self.counts):
            window = counts[windows[axis]] if axis < len(windows) else counts
            divisor = window.astype(self.dtype) ** self.power
            values = values / divisor.reshape([-1 if axis == other else 1 for other in range(len(self.shape))])
        return np.asarray(values)

    def numpy(self) -> Array:
        """The whole moment."""
        return self[()]


@lru_cache(maxsize=8)
def _repeated(moment: GrownMoment) -> Any:
    """The source's elements, repeated along the grown axes and not divided; the last few moments' are in memory."""
    if moment.copies is None:
        return moment.source.read()
    source, dtype = moment.source, ir.DataType.from_numpy(moment.source.dtype)
    lazy = ir.LazyTensor(lambda: ir.Tensor(source.read(), dtype=dtype), dtype=dtype, shape=ir.Shape(source.shape))
    return GrownTensor(lazy, *moment.copies, Strategy("symmetric"))


def forget() -> None:
    """Let go of what was read of the last moments."""
    _repeated.cache_clear()


def grow_moments(plan: Plan, moments: Mapping[str, Moments]) -> dict[str, GrownMoments]:
    """Grow an optimizer's state by a plan; nothing is computed before it is asked for.

    Args:
        plan: the growth of the model.
        moments: by the names of the source's tensors.

    Returns:
        By the names of the grown model's tensors. What the plan does not touch has the gradient that it had.

    Raises:
        BadRequest: a moment has another shape than the tensor that the plan grows.
    """
    maps, parts = plan.maps, separated(plan)
    recipes: dict[str, Recipe | None] = {name: None for name in moments if name not in plan.tensors}
    recipes |= {name: recipe for name, recipe in plan.tensors.items() if recipe.source in moments}
    grown: dict[str, GrownMoments] = {}
    for name, recipe in recipes.items():
        source = name if recipe is None else recipe.source
        each, count = moments[source], parts.get(source, 1)
        for moment in (each.first, each.second):
            _check_shape(source, moment.shape, each.first.shape if recipe is None else recipe.source_shape(maps))
        grown[name] = GrownMoments(
            GrownMoment(each.first, recipe, maps, 1, count), GrownMoment(each.second, recipe, maps, 2, count), each.step
        )
    return grown


def separated(plan: Plan) -> dict[str, int]:
    """The source tensors that became several in the grown model, and how many."""
    counts = Counter(recipe.source for recipe in plan.tensors.values())
    every = {source: count + (source not in plan.tensors) for source, count in counts.items()}
    return {source: count for source, count in every.items() if count > 1}


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise BadRequest(f"the moments of {name!r} have the shape {found}, the source's tensor has {wanted}")


# -- the steps that follow --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepFactors:
    """What to multiply AdamW's settings with so that a grown tensor moves exactly as its source would."""

    rate: float = 1.0
    eps: float = 1.0
    weight_decay: float = 1.0


def step_factors(plan: Plan, name: str) -> StepFactors:
    """How a tensor of the grown model has to be stepped for the grown model to follow the small one.

    Adam's step m / (sqrt(v) + eps) does not change when the gradient is multiplied, but for eps. A grown element is
    scale * share times its source, and so must its step be; the decay, rate * weight_decay, must stay what it was.
    Among weight matrices that is the rule of muP for Adam, a rate that falls with the fan-in (Yang et al.,
    arXiv 2203.03466).

    Raises:
        BadRequest: the elements of this tensor are repeated unequally: no one rate serves them.
    """
    parts = separated(plan)
    recipe = plan.tensors.get(name)
    if recipe is None:
        return StepFactors(eps=1.0 / parts.get(name, 1))
    axes = recipe.index(plan.maps)
    share = 1.0
    other = 1.0
    for axis in axes:
        for counts in (axis.count, axis.other_count):
            if counts.size and counts.min() != counts.max():
                raise BadRequest(f"{name!r} is repeated unequally along an axis: no one rate serves its elements")
        share /= float(axis.count[0]) if axis.grown else 1.0
        other *= float(axis.other_count[0]) if axis.grown else 1.0
    rate = recipe.scale * share
    return StepFactors(rate, 1.0 / (recipe.scale * other * parts.get(recipe.source, 1)), 1.0 / rate)
