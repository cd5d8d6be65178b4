"""The axes of every activation, in the plan's own terms.

They tell which source index each index of a grown activation repeats, and how it is stretched. Validation uses them to
compare the first layers of a large model, and diagnosis to compare the clones in the activations of a grown model.
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
    """The axes of every value that grows, by the name of the value.

    An axis with a part whose size is known only when the model runs gets None, like an axis that does not grow.

    Args:
        dimensions: the dimensions of the plan's source.
        plan: the plan.

    Returns:
        The axes of each value that has a name and at least one growing axis.
    """
    named = name_dimensions(dimensions)
    grown = [dimension for dimension in named if dimension.name in plan.dims]
    maps = {dimension.dim: (dimension.name, plan.dims[dimension.name].map) for dimension in grown}
    terms = GrownTerms(dimensions.space, maps)
    axes_of: dict[str, ValueAxes] = {}
    for value, axes in dimensions.axes.items():
        if value.name and axes and any(map(terms.grows, axes)):
            powers = plan.stretched.get(value.name, {})
            axes_of[value.name] = tuple(
                terms.factors(term, powers.get(axis)) if terms.grows(term) else None for axis, term in enumerate(axes)
            )
    return axes_of


Activations = Mapping[str, ValueAxes]
