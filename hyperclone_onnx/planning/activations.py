"""The axes of every activation in the plan's own terms: which indices of a grown activation repeat which of the source.

Planning knows this of every value of the source graph. The first layers of a large model are compared by it, and so
are the clones in a grown model's activations.
"""

from __future__ import annotations

from collections.abc import Mapping

from hyperclone_onnx.analysis.roles import name_dimensions
from hyperclone_onnx.plan.maps import Axis
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.rules.grown_terms import GrownTerms

ValueAxes = tuple[tuple[Axis, ...] | None, ...]
"""The factors of each axis of a value, outermost first; None for an axis that does not grow."""


def activations(dimensions: Dimensions, plan: Plan) -> dict[str, ValueAxes]:
    """The axes of every value of which any axis grows, by name.

    An axis of which a part is known only when the model runs is left out like one that does not grow.

    Args:
        dimensions: the dimensions of the plan's source.
        plan: the plan.
    """
    named = name_dimensions(dimensions)
    grown = [dimension for dimension in named if dimension.name in plan.dims]
    maps = {dimension.dim: (dimension.name, plan.dims[dimension.name].map) for dimension in grown}
    terms = GrownTerms(dimensions.space, maps)
    axes_of: dict[str, ValueAxes] = {}
    for value, axes in dimensions.axes.items():
        if value.name and axes and any(map(terms.grows, axes)):
            axes_of[value.name] = tuple(terms.factors(term) if terms.grows(term) else None for term in axes)
    return axes_of


Activations = Mapping[str, ValueAxes]
