"""Weighs what norms average, where no scale of the channels keeps their averages.

The copies of each channel then hold the same number everywhere, as along any other axis, and the averages of the norms
count each channel of the source once. This is right in front of any norm and behind it, whatever stands on the residual
stream. The price: a fused norm becomes simple operators (`plan.edits.WeighAverage`).
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Dim, Product, Term
from hyperclone_onnx.graphs import MICROSOFT, opset_of
from hyperclone_onnx.plan.edits import Edit, WeighAverage
from hyperclone_onnx.planning.request import Growth
from hyperclone_onnx.planning.stretching import reduced_axes
from hyperclone_onnx.rules.dimensions import Dimensions

Averaged = list[tuple[int, Term]]
"""The axes that a node averages over: (the axis as a negative number, the term)."""


def weighed(growth: Growth, dims: set[Dim]) -> tuple[Edit, ...] | None:
    """The edits that let each node which averages over some dimensions count each source index once.

    Args:
        growth: the source map of each dimension.
        dims: the dimensions.

    Returns:
        The edits; None where a node averages over one of the dimensions and is no norm that can be written out.
    """
    terms, edits = growth.terms, []
    nodes: dict[ir.Node, None] = {}
    for average in growth.dimensions.uniform:
        leaves = set(terms.leaves(average.term))
        uneven = {atom for atom in leaves if not growth.maps[atom][1].is_even}
        weighs = not terms.grow_alike(average.term) or not uneven.isdisjoint(dims)
        if weighs and not leaves.isdisjoint(dims):
            if not uneven.issubset(dims):
                return None
            nodes[average.node] = None
    for node in nodes:
        form = _FORMS.get((node.domain, node.op_type))
        averaged = None if form is None or node in growth.dimensions.unrelated else form(growth.dimensions, node)
        if averaged is None:
            return None
        axes = []
        for axis, term in averaged:
            if not dims.isdisjoint(terms.leaves(term)):
                factors = terms.factors(term)
                if factors is None:
                    return None
                axes.append((axis, factors))
        edits.append(WeighAverage(node.name or "", tuple(axis for axis, _ in averaged), tuple(axes)))
    return tuple(edits)


Form = Callable[[Dimensions, ir.Node], Averaged | None]
_FORMS: dict[tuple[str, str], Form] = {}
"""By (domain, operator): the axes that it averages over. `rewriting.written_norms` writes each of these operators."""


def _form(*op_types: str, domain: str = "") -> Callable[[Form], Form]:
    def register(form: Form) -> Form:
        _FORMS.update({(domain, op_type): form for op_type in op_types})
        return form

    return register


@_form("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def _from_an_axis_on(dimensions: Dimensions, node: ir.Node) -> Averaged | None:
    axes = dimensions.axes_of(node, 0) or ()
    attribute = node.attributes.get("axis")
    first = (-1 if attribute is None else attribute.as_int()) % max(len(axes), 1)
    return [(axis - len(axes), axes[axis]) for axis in range(first, len(axes))]


@_form("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "EmbedLayerNormalization", domain=MICROSOFT)
def _last_axis(dimensions: Dimensions, node: ir.Node) -> Averaged | None:
    axes = dimensions.axes.get(node.outputs[0])
    return [(-1, axes[-1])] if axes else None


@_form("Softmax", "LpNormalization")
def _one_axis(dimensions: Dimensions, node: ir.Node) -> Averaged | None:
    axes = dimensions.axes_of(node, 0) or ()
    if node.op_type != "LpNormalization" and opset_of(dimensions.model.graph) < 13:
        return None  # it runs over all axes from `axis` on, as one axis
    attribute = node.attributes.get("axis")
    axis = (-1 if attribute is None else attribute.as_int()) % len(axes)
    return [(axis - len(axes), axes[axis])]


@_form("MeanVarianceNormalization")
def _listed_axes(dimensions: Dimensions, node: ir.Node) -> Averaged | None:
    axes = dimensions.axes_of(node, 0) or ()
    attribute = node.attributes.get("axes")
    listed = [0, 2, 3] if attribute is None else list(attribute.as_ints())
    return [(axis % len(axes) - len(axes), axes[axis]) for axis in listed]


@_form("ReduceMean")
def _reduced_axes(dimensions: Dimensions, node: ir.Node) -> Averaged | None:
    axes = dimensions.axes_of(node, 0) or ()
    reduced = reduced_axes(dimensions, node, len(axes))
    return None if reduced is None else [(axis - len(axes), axes[axis]) for axis in sorted(reduced)]


@_form("GroupNormalization")
def _channels_of_a_group(dimensions: Dimensions, node: ir.Node) -> Averaged | None:
    """The axes of a value of the shape (batch, groups, channels of a group, places)."""
    terms = [average.term for average in dimensions.uniform if average.node is node]
    return [(-2, terms[0]), (-1, Product(tuple(terms[1:])))]
