"""From a growth to a plan: which tensors come out, which nodes are edited, what the interface looks like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import onnx_ir as ir

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.graphs import FreshNames, describe, opset_of
from hyperclone_onnx.plan.maps import Kept
from hyperclone_onnx.plan.plans import Edit, Feed, GrownDim, Interface, Plan, Recipe
from hyperclone_onnx.plan.strategies import Strategy
from hyperclone_onnx.planning.carriers import Tracer
from hyperclone_onnx.planning.request import Growth
from hyperclone_onnx.planning.sharing import Sharing
from hyperclone_onnx.rules import registry
from hyperclone_onnx.rules.dimensions import Axes, Dimensions, Use
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.grown_terms import GrownTerms


def make_plan(
    growth: Growth,
    strategy: Strategy | None = None,
    *,
    untie: bool = False,
    keep_interface: bool = False,
) -> Plan:
    """Plan a growth.

    Args:
        growth: the source map of each dimension.
        strategy: how repeats share a weight.
        untie: give each use of a tensor that is stored once a tensor of its own where their recipes differ
            (a tied embedding), instead of moving the division into a scalar.
        keep_interface: leave the graph's inputs and outputs in the source's sizes.

    Raises:
        Refused: a norm would average over unequally repeated parts, or a node cannot be edited.
    """
    dimensions = growth.dimensions
    _check_averages(dimensions, growth.terms)
    sharing = Sharing(growth, untie)
    sharing.share_sums()
    tensors, feeds = _tensors(sharing)
    edits = [*sharing.edits, *_node_edits(growth, sharing.terms)]
    roles = {each.name: each.role for each in growth.named}
    return Plan(
        dims={name: GrownDim(roles[name], chosen) for name, chosen in growth.maps.values()},
        tensors=tensors,
        feeds=tuple(feeds),
        edits=tuple(edits),
        inputs=tuple(_interface(dimensions.model.graph.inputs, sharing)),
        outputs=tuple(_interface(dimensions.model.graph.outputs, sharing)),
        strategy=strategy or Strategy(),
        keep_interface=keep_interface,
    )


def _node_edits(growth: Growth, terms: GrownTerms) -> Iterable[Edit]:
    dimensions = growth.dimensions
    for node in dimensions.walked:
        edit = registry.edit(node.domain, node.op_type)
        if edit is None or not _touched(dimensions, terms, node):
            continue
        op = GrownOp(dimensions, terms, node, opset_of(dimensions.model.graph, node.domain))
        try:
            edit(op)
        except Refused as problem:
            if describe(node) in str(problem):
                raise
            raise op.refuse(str(problem)) from problem
        yield from op.edits


def _touched(dimensions: Dimensions, terms: GrownTerms, node: ir.Node) -> bool:
    every: list[Axes | None] = [dimensions.axes_of(node, i) for i in range(len(node.inputs))]
    every += [dimensions.axes.get(output) for output in node.outputs]
    has_body = any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values())
    return has_body or any(terms.grows(term) for axes in every if axes for term in axes)


def _check_averages(dimensions: Dimensions, terms: GrownTerms) -> None:
    """An average over an axis is unchanged only when every index is repeated equally often."""
    tracer = Tracer(dimensions, terms)
    for each in dimensions.uniform:
        # Where each factor of an axis repeats its indices equally often, so does the axis.
        growing = [factor for factor in terms.space.factors(each.term) if terms.grows(factor)]
        if any(tracer.repeats(factor) is None for factor in growing):
            raise Refused(
                f"{describe(each.node)} averages over an axis whose parts would not grow equally "
                f"({terms.written(each.term)}): give its parts one factor with --set"
            )


def _tensors(sharing: Sharing) -> tuple[dict[str, Recipe], list[Feed]]:
    """A recipe for each tensor that changes, and the uses that read another tensor than before."""
    dimensions = sharing.dimensions
    recipes: dict[str, dict[object, tuple[Recipe, list[Use]]]] = defaultdict(dict)
    for value, use, axes in dimensions.initializer_uses():
        recipe = _recipe(sharing, value.name or "", use, axes)
        key = (sharing.terms.canonical(recipe.axes), recipe.shared, recipe.scale, recipe.bits)
        recipes[recipe.source].setdefault(key, (recipe, []))[1].append(use)
    tensors: dict[str, Recipe] = {}
    feeds: list[Feed] = []
    fresh = FreshNames(dimensions.model.graph)
    for name, variants in recipes.items():
        kept_elsewhere = _read_elsewhere(dimensions, name)
        ordered = sorted(variants.values(), key=lambda variant: not _is_trivial(variant[0]))
        for number, (recipe, uses) in enumerate(ordered):
            if number == 0 and not (kept_elsewhere and not _is_trivial(recipe)):
                if not _is_trivial(recipe):
                    tensors[name] = recipe
                continue
            own = fresh.value(name)
            tensors[own] = recipe
            feeds.extend(Feed(node.name or "", index, own) for node, index in uses)
    return tensors, feeds


def _recipe(sharing: Sharing, source: str, use: Use, axes: Axes) -> Recipe:
    factors = sharing.terms.recipe_axes(axes)
    shared = tuple(
        (axis, position)
        for axis in sorted(sharing.marks_of(use))
        for position, factor in enumerate(factors[axis])
        if not isinstance(factor, Kept)
    )
    return Recipe(source, factors, shared, sharing.scales.get(use, 1.0), sharing.dimensions.packed.get(use))


def _read_elsewhere(dimensions: Dimensions, name: str) -> bool:
    """Whether a tensor is also read where no recipe reaches: in the body of an operator without a rule."""
    uses = [use for use in dimensions.model.graph.initializers[name].uses() if use.node not in dimensions.idle]
    return any((use.node, use.idx) not in dimensions.use_axes for use in uses)


def _is_trivial(recipe: Recipe) -> bool:
    return not recipe.grows and recipe.scale == 1.0


def _interface(values: Iterable[ir.Value], sharing: Sharing) -> Iterable[Interface]:
    """The grown inputs or outputs."""
    for value in values:
        axes = sharing.dimensions.axes.get(value) or ()
        if any(sharing.terms.grows(term) for term in axes):
            yield Interface(value.name or "", tuple(sharing.terms.factors(term) for term in axes))
