"""Says which indices of a grown model's activations are clones of one another.

If the source is given, planning computes the axes of every value (`planning.activations`). If there is only the grown
file, its plan has the source maps of the axes of its tensors. The walk over the grown graph relates these axes to the
axes of activations: both consist of dimensions. So the map of a dimension is learnt from the tensors, and used for the
activations. A dimension without a map counts as one that did not grow. Then fewer clones are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Concat, Dim, Product, Term
from hyperclone_onnx.diagnosis.distance import joint
from hyperclone_onnx.plan.maps import (
    Axis,
    ConcatOf,
    FirstAndFurther,
    Indices,
    Kept,
    Maps,
    ProductOf,
    grown_size,
    index_axis,
    names_in,
)
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.planning.activations import Activations
from hyperclone_onnx.rules.dimensions import Dimensions


@dataclass(frozen=True)
class Factor:
    """A factor of an axis."""

    size: int | None
    """Its length; None if it is known only when the model runs."""
    source: Indices | None
    """The source index of each index; None if the factor did not grow."""
    dims: tuple[str, ...] = ()
    """The dimensions of the plan of which it consists."""


@dataclass
class ValueAxes:
    """The source maps of the dimensions of a grown graph."""

    dimensions: Dimensions
    """The dimensions of the grown graph."""
    maps: Maps
    """The source maps of the plan."""
    sources: dict[Dim, tuple[Indices, tuple[str, ...]]] = field(default_factory=dict)
    """For a dimension of the graph, the source index of each index, and the dimensions of the plan."""
    contradicted: set[Dim] = field(default_factory=set)
    """Dimensions for which two tensors give different maps. They count as dimensions without a map."""
    planned: Activations | None = None
    """The axes of each value by its name, if the source is given."""

    def factors(self, value: ir.Value) -> list[list[Factor]] | None:
        """The factors of each axis of a value; None if no factor grew, or the axes are not known."""
        axes = self.dimensions.axes.get(value)
        if not axes:
            return None
        if self.planned is not None:
            planned = self.planned.get(value.name or "")
            same_rank = planned is not None and len(planned) == len(axes)
            return [self._planned(*pair) for pair in zip(planned, axes, strict=True)] if planned and same_rank else None
        by_axis = [_merged([self._factor(term) for term in self.dimensions.space.factors(axis)]) for axis in axes]
        return by_axis if any(factor.source is not None for factors in by_axis for factor in factors) else None

    def _planned(self, axis: tuple[Axis, ...] | None, term: Term) -> list[Factor]:
        """The factors of an axis that planning gives. The walk gives the length of an axis that does not grow."""
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
        source = self._source(term) if size is not None else None
        return Factor(size, *source) if source is not None and source[1] else Factor(size, None)

    def _source(self, term: Term) -> tuple[Indices, tuple[str, ...]] | None:
        """The source index of each index of a static term, and its dimensions in the plan; None if not known."""
        space = self.dimensions.space
        resolved = space.resolve(term)
        if isinstance(resolved, Dim):
            if resolved in self.sources:
                return self.sources[resolved]
            return np.arange(space.static(resolved) or 0, dtype=np.int64), ()
        parts = resolved.factors if isinstance(resolved, Product) else resolved.segments
        part_sources = [self._source(part) for part in parts]
        known = [part_source for part_source in part_sources if part_source is not None]
        if len(known) < len(part_sources):
            return None
        sources = [source for source, _ in known]
        names = tuple(dict.fromkeys(name for _, part_names in known for name in part_names))
        return (joint(sources) if isinstance(resolved, Product) else beside(sources)), names

    def learn(self, axis: Sequence[Axis], term: Term) -> None:
        """Learn the maps of dimensions from an axis of a tensor.

        Args:
            axis: the factors of the axis in the plan.
            term: the same axis in the dimensions of the graph.
        """
        space = self.dimensions.space
        plan = [part for factor in axis for part in _factors(factor) if grown_size(part, self.maps) != 1]
        graph = [part for part in space.factors(term) if space.static(part) != 1]
        for plan_run, graph_run in self._aligned(plan, graph, product=True):
            self._learn_run(plan_run, graph_run)

    def _aligned(
        self, plan: Sequence[Axis], graph: Sequence[Term], product: bool
    ) -> list[tuple[list[Axis], list[Term]]]:
        """Divide both into the shortest runs of equal size; no runs if that is not possible.

        Args:
            plan: factors or segments of the plan.
            graph: factors or segments of the graph.
            product: whether they are factors, whose sizes are multiplied. The sizes of segments are added.
        """
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
        if len(graph) != 1 or all(isinstance(part, Kept | FirstAndFurther) for part in plan):
            return
        resolved = self.dimensions.space.resolve(graph[0])
        if isinstance(resolved, Dim):
            index = index_axis([(part, False) for part in plan], self.maps)
            self._set(resolved, index.source, tuple(name for part in plan for name in names_in(part)))
        elif isinstance(resolved, Concat) and len(plan) == 1 and isinstance(plan[0], ConcatOf):
            segments = [part for segment in plan[0].parts for part in _segments(segment)]
            for plan_run, graph_run in self._aligned(segments, resolved.segments, product=False):
                if len(graph_run) == 1:
                    self.learn([ConcatOf(tuple(plan_run))] if len(plan_run) > 1 else plan_run, graph_run[0])

    def _set(self, dim: Dim, source: Indices, names: tuple[str, ...]) -> None:
        known = self.sources.get(dim)
        if known is not None and not np.array_equal(known[0], source):
            self.contradicted.add(dim)
        if dim in self.contradicted:
            self.sources.pop(dim, None)
        else:
            self.sources[dim] = source, tuple(dict.fromkeys((*(known[1] if known else ()), *names)))


def value_axes(dimensions: Dimensions, plan: Plan, planned: Activations | None = None) -> ValueAxes:
    """The source maps of a grown graph's dimensions.

    Args:
        dimensions: the dimensions of the grown graph.
        plan: its plan.
        planned: the axes that planning gives, if the source is given. Otherwise the maps are learnt from the tensors.
    """
    learnt = ValueAxes(dimensions, plan.maps, planned=planned)
    if planned is not None:
        return learnt
    for value, _, axes in dimensions.initializer_uses():
        recipe = plan.tensors.get(value.name or "")
        if recipe is not None and len(recipe.axes) == len(axes):
            for axis, term in zip(recipe.axes, axes, strict=True):
                learnt.learn(axis, term)
    return learnt


def beside(sources: Sequence[Indices]) -> Indices:
    """The source index of each index of an axis whose segments have the given source indices."""
    sizes = [int(source.max()) + 1 if len(source) else 0 for source in sources]
    starts = np.cumsum([0, *sizes[:-1]])
    return np.concatenate([source + start for source, start in zip(sources, starts, strict=True)])


def _merged(factors: list[Factor]) -> list[Factor]:
    """The factors, where adjacent factors that did not grow are merged into one."""
    merged: list[Factor] = []
    for factor in factors:
        if merged and factor.source is None and merged[-1].source is None:
            before = merged.pop().size
            factor = Factor(None if before is None or factor.size is None else before * factor.size, None)
        merged.append(factor)
    return merged


def _factors(axis: Axis) -> list[Axis]:
    return [factor for part in axis.parts for factor in _factors(part)] if isinstance(axis, ProductOf) else [axis]


def _segments(axis: Axis) -> list[Axis]:
    return [segment for part in axis.parts for segment in _segments(part)] if isinstance(axis, ConcatOf) else [axis]
