"""Grow Adam's moments with the model.

A plan makes each grown tensor linearly from its source: theta' = G theta, with
theta'[j] = scale * share[j] * theta[m(j)]. Here m(j) is the source element that j repeats. The shares of all repeats of
one source element along the *shared* axes add up to 1. For every theta, the grown model's loss at G theta equals the
small model's loss at theta. So the chain rule gives, for the gradients g of the small and g' of the grown model,

    g[i] = sum over the repeats j of i of (scale * share[j] * g'[j]).

Repeats along a shared axis read equal activations, so their gradients are equal with every strategy. Repeats along the
other axes have equal gradients if the strategy makes them symmetric. Then

    g'[j] = g[m(j)] / (scale * n[j]),    n[j] the number of repeats of j along the axes that are not shared.

Where the recipe also stretches an axis, the stretch of j is one more factor of the scale.

Along the axis of a LayerNorm, some channels may be no copies (`planning/averaging.py`). Their first moment begins at
zero: what reads them reads zeros, so that its gradient is zero, and a LayerNorm passes no mean of gradients to what
writes them. Their second moment begins at the mean over the source's channels, so that their first steps are not larger
than those of other channels.

So the gradient grows by the dual of the recipe. Where the weight is divided among repeats, the gradient is copied.
Where the weight is copied, the gradient is divided. Adam's first moment is a mean of gradients, so it grows by the same
factor. The second moment is a mean of squared gradients, so it grows by the square of the factor. With noise or the
diagonal strategy the repeats have different gradients, and the formula gives their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import Array, StoredArray
from hyperclone_onnx.frameworks.continuation import separated
from hyperclone_onnx.plan.maps import Axis, AxisIndex, Fill, Indices, Maps, fills_of, with_fill, with_powers
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.plan.strategies import Strategy
from hyperclone_onnx.tensors.grown_tensor import GrownTensor


@dataclass(frozen=True)
class Moments:
    """Adam's state of one tensor: the running means of its gradient and of the squared gradient, and the step count."""

    first: StoredArray
    second: StoredArray
    step: float


@dataclass(frozen=True)
class GrownMoments:
    """Adam's state of one grown tensor. The moments are computed when they are read."""

    first: GrownMoment
    second: GrownMoment
    step: float


class GrownMoment:
    """A moment of a grown tensor, from which any slice can be computed.

    Args:
        source: the moment of the source tensor.
        recipe: how the grown tensor is made; None if growth did not change the tensor.
        maps: the source map of each named dimension.
        power: 1 for a mean of gradients, 2 for a mean of squared gradients.
        tensors: how many tensors of the grown model the source tensor became. We assume that they have equal parts in
            its gradient.
    """

    def __init__(self, source: StoredArray, recipe: Recipe | None, maps: Maps, power: int, tensors: int = 1) -> None:
        self.dtype: np.dtype[Any] = np.dtype(np.float64 if source.dtype == np.float64 else np.float32)
        self.power = power
        self.scale = (1.0 if recipe is None else recipe.scale) * tensors
        self.source = source
        axes = () if recipe is None else recipe.index(maps)
        self.shape = source.shape if recipe is None else tuple(axis.grown for axis in axes)
        self.counts = [] if recipe is None else [_counts(*pair) for pair in zip(recipe.axes, axes, strict=True)]
        self.copies = None if recipe is None else (_dual(recipe, power), maps)

    def __getitem__(self, windows: slice | tuple[slice, ...]) -> Array:
        """Compute a part of the moment; `windows` has one slice with step 1 for each leading axis."""
        windows = windows if isinstance(windows, tuple) else (windows,)
        values = np.asarray(_repeated(self)[windows], dtype=self.dtype) / self.dtype.type(self.scale**self.power)
        for axis, counts in enumerate(self.counts):
            window = counts[windows[axis]] if axis < len(windows) else counts
            divisor = window.astype(self.dtype) ** self.power
            values = values / divisor.reshape([-1 if axis == other else 1 for other in range(len(self.shape))])
        return np.asarray(values)

    def numpy(self) -> Array:
        """Compute the whole moment."""
        return self[()]


def _dual(recipe: Recipe, power: int) -> Recipe:
    """The recipe that repeats a moment. Where growth multiplies a weight, its gradient is divided by the same."""
    fill: Fill = "zero" if power == 1 else "mean"
    axes = tuple(tuple(with_powers(with_fill(factor, fill), -power) for factor in axis) for axis in recipe.axes)
    return replace(recipe, axes=axes, shared=(), scale=1.0)


def _counts(factors: Sequence[Axis], axis: AxisIndex) -> Indices:
    """The repeats of each index along the axis that do not share. Indices that are no copies count as copies do."""
    if not any(map(fills_of, factors)):
        return axis.other_count
    return np.broadcast_to(axis.other_count[:1], axis.other_count.shape)


@lru_cache(maxsize=8)
def _repeated(moment: GrownMoment) -> Any:
    """Return the source's elements, repeated along the grown axes and divided by their stretch alone.

    The last 8 moments are cached.
    """
    if moment.copies is None:
        return moment.source.read()
    source, dtype = moment.source, ir.DataType.from_numpy(moment.source.dtype)
    lazy = ir.LazyTensor(lambda: ir.Tensor(source.read(), dtype=dtype), dtype=dtype, shape=ir.Shape(source.shape))
    return GrownTensor(lazy, *moment.copies, Strategy("symmetric"))


def forget() -> None:
    """Free the cached source moments."""
    _repeated.cache_clear()


def grow_moments(plan: Plan, moments: Mapping[str, Moments]) -> dict[str, GrownMoments]:
    """Grow an optimizer's state by a plan. The moments are computed only when they are read.

    Args:
        plan: the plan that grew the model.
        moments: the moments of the small model, by the names of its tensors.

    Returns:
        The moments of the grown model, by the names of its tensors. A tensor that is not in the plan has the same
        gradient as before, so its moments stay as they are.

    Raises:
        BadRequest: a moment has another shape than the tensor that the plan grows.
    """
    maps, parts = plan.maps, separated(plan)
    recipes: dict[str, Recipe | None] = {name: None for name in moments if name not in plan.tensors}
    recipes |= {name: recipe for name, recipe in plan.tensors.items() if recipe.source in moments}
    grown: dict[str, GrownMoments] = {}
    for name, recipe in recipes.items():
        source = name if recipe is None else recipe.source
        old, count = moments[source], parts.get(source, 1)
        for moment in (old.first, old.second):
            _check_shape(source, moment.shape, old.first.shape if recipe is None else recipe.source_shape(maps))
        grown[name] = GrownMoments(
            GrownMoment(old.first, recipe, maps, 1, count), GrownMoment(old.second, recipe, maps, 2, count), old.step
        )
    return grown


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise BadRequest(f"the moments of {name!r} have the shape {shape}, the source's tensor has {expected}")
