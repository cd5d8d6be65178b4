"""Which indices of a grown model's activations are clones of one another.

With the source at hand, planning knows the axes of every value (`planning.activations`). A grown file alone has a plan
with the source maps of its tensors' axes. Then the grown graph is walked like any graph. Where an axis of a stored
tensor is known both to the plan and to the walk, a dimension learns its map, and the axes of activations are made of
such dimensions. A dimension that learns none is taken for kept: fewer clones are compared then, never others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Concat, Dim, Product, Term
from hyperclone_onnx.diagnosis.distance import joint
from hyperclone_onnx.plan.maps import Axis, ConcatOf, Indices, Kept, Maps, Named, ProductOf, grown_size, index_axis
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.planning.activations import Activations
from hyperclone_onnx.rules.dimensions import Dimensions


@dataclass(frozen=True)
class Factor:
    """A factor of an axis: its length where that is known before running, and its source map where it grew."""

    size: int | None
    source: Indices | None
    dims: tuple[str, ...] = ()


@dataclass
class ValueAxes:
    """The source maps of the dimensions of a grown graph."""

    dimensions: Dimensions
    maps: Maps
    sources: dict[Dim, tuple[Indices, tuple[str, ...]]] = field(default_factory=dict)
    contradicted: set[Dim] = field(default_factory=set)
    planned: Activations | None = None
    """The axes by the name of the value, where the source was at hand."""

    def factors(self, value: ir.Value) -> list[list[Factor]] | None:
        """The factors of each axis of a value; None where no part of it grew, or its axes are not known."""
        axes = self.dimensions.axes.get(value)
        if not axes:
            return None
        if self.planned is not None:
            planned = self.planned.get(value.name or "")
            same_rank = planned is not None and len(planned) == len(axes)
            return [self._planned(*pair) for pair in zip(planned, axes, strict=True)] if planned and same_rank else None
        found = [_merged([self._factor(term) for term in self.dimensions.space.factors(axis)]) for axis in axes]
        return found if any(each.source is not None for factors in found for each in factors) else None

    def _planned(self, axis: tuple[Axis, ...] | None, term: Term) -> list[Factor]:
        """The factors of an axis that the plan has; one that does not grow has the length that the walk knows."""
        if axis is None:
            return [Factor(self.dimensions.space.static(term), None)]
        sizes = [grown_size(part, self.maps) for part in axis]
        return _merged(
            [
                Factor(size, index_axis([(part, False)], self.maps).source, tuple(names_in(part)))
                if names_in(part)
                else Factor(size, None)
                for part, size in zip(axis, sizes, strict=True)
            ]
        )

    def _factor(self, term: Term) -> Factor:
        size = self.dimensions.space.static(term)
        made = self._source(term) if size is not None else None
        return Factor(size, *made) if made is not None and made[1] else Factor(size, None)

    def _source(self, term: Term) -> tuple[Indices, tuple[str, ...]] | None:
        """The source index of each index of a static term, and the dimensions of the plan that it is made of."""
        space = self.dimensions.space
        resolved = space.resolve(term)
        if isinstance(resolved, Dim):
            if resolved in self.sources:
                return self.sources[resolved]
            return np.arange(space.static(resolved) or 0, dtype=np.int64), ()
        parts = resolved.factors if isinstance(resolved, Product) else resolved.segments
        made = [self._source(part) for part in parts]
        known = [each for each in made if each is not None]
        if len(known) < len(made):
            return None
        sources = [source for source, _ in known]
        names = tuple(dict.fromkeys(name for _, each in known for name in each))
        return (joint(sources) if isinstance(resolved, Product) else beside(sources)), names

    # -- learning -----------------------------------------------------------------------------------------

    def learn(self, axis: Sequence[Axis], term: Term) -> None:
        """Learn from an axis that is known both as the plan's factors and as the graph's dimensions."""
        space = self.dimensions.space
        plan = [part for factor in axis for part in _factors(factor) if grown_size(part, self.maps) != 1]
        graph = [part for part in space.factors(term) if space.static(part) != 1]
        for some, others in self._aligned(plan, graph, product=True):
            self._learn_run(some, others)

    def _aligned(
        self, plan: Sequence[Axis], graph: Sequence[Term], product: bool
    ) -> list[tuple[list[Axis], list[Term]]]:
        """The shortest runs of both that are equally long; nothing where they do not line up."""
        space = self.dimensions.space
        left = [grown_size(part, self.maps) for part in plan]
        right = [space.static(part) for part in graph]
        if any(size is None for size in right):
            return []
        runs: list[tuple[list[Axis], list[Term]]] = []
        i = j = 0
        while i < len(left) and j < len(right):
            first, second = (i, j)
            a, b = left[i], right[j] or 0
            i, j = i + 1, j + 1
            while a != b:
                if a < b and i < len(left):
                    a, i = (a * left[i] if product else a + left[i]), i + 1
                elif b < a and j < len(right):
                    b, j = (b * (right[j] or 0) if product else b + (right[j] or 0)), j + 1
                else:
                    return []
            runs.append((list(plan[first:i]), list(graph[second:j])))
        return runs if i == len(left) and j == len(right) else []

    def _learn_run(self, plan: list[Axis], graph: list[Term]) -> None:
        if len(graph) != 1 or all(isinstance(part, Kept) for part in plan):
            return
        resolved = self.dimensions.space.resolve(graph[0])
        if isinstance(resolved, Dim):
            index = index_axis([(part, False) for part in plan], self.maps)
            self._set(resolved, index.source, tuple(name for part in plan for name in names_in(part)))
        elif isinstance(resolved, Concat) and len(plan) == 1 and isinstance(plan[0], ConcatOf):
            segments = [part for segment in plan[0].parts for part in _segments(segment)]
            for some, others in self._aligned(segments, resolved.segments, product=False):
                if len(others) == 1:
                    self.learn([ConcatOf(tuple(some))] if len(some) > 1 else some, others[0])

    def _set(self, dim: Dim, source: Indices, names: tuple[str, ...]) -> None:
        known = self.sources.get(dim)
        if known is not None and not np.array_equal(known[0], source):
            self.contradicted.add(dim)
        if dim in self.contradicted:
            self.sources.pop(dim, None)
        else:
            self.sources[dim] = source, tuple(dict.fromkeys((*(known[1] if known else ()), *names)))


def value_axes(dimensions: Dimensions, plan: Plan, planned: Activations | None = None) -> ValueAxes:
    """The maps of a grown graph's axes: those that were planned, or else those that can be learnt from the plan."""
    found = ValueAxes(dimensions, plan.maps, planned=planned)
    if planned is not None:
        return found
    for value, _, axes in dimensions.initializer_uses():
        recipe = plan.tensors.get(value.name or "")
        if recipe is not None and len(recipe.axes) == len(axes):
            for axis, term in zip(recipe.axes, axes, strict=True):
                found.learn(axis, term)
    return found


def names_in(axis: Axis) -> list[str]:
    """The dimensions that an axis of the plan is made of."""
    if isinstance(axis, Named):
        return [axis.name]
    return [name for part in axis.parts for name in names_in(part)] if not isinstance(axis, Kept) else []


def beside(sources: Sequence[Indices]) -> Indices:
    """The source index of each index of segments that stand side by side."""
    sizes = [int(source.max()) + 1 if len(source) else 0 for source in sources]
    starts = np.cumsum([0, *sizes[:-1]])
    return np.concatenate([source + start for source, start in zip(sources, starts, strict=True)])


def _merged(factors: list[Factor]) -> list[Factor]:
    """The factors, with neighbours that did not grow taken together."""
    merged: list[Factor] = []
    for each in factors:
        if merged and each.source is None and merged[-1].source is None:
            before = merged.pop().size
            each = Factor(None if before is None or each.size is None else before * each.size, None)
        merged.append(each)
    return merged


def _factors(axis: Axis) -> list[Axis]:
    return [each for part in axis.parts for each in _factors(part)] if isinstance(axis, ProductOf) else [axis]


def _segments(axis: Axis) -> list[Axis]:
    return [each for part in axis.parts for each in _segments(part)] if isinstance(axis, ConcatOf) else [axis]
