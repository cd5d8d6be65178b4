"""From a growth to a plan: which tensors come out, which nodes are edited, what the interface looks like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import onnx_ir as ir

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.graphs import FreshNames, describe, opset_of
from hyperclone_onnx.plan.edits import Edit
from hyperclone_onnx.plan.maps import Kept
from hyperclone_onnx.plan.origins import Origin
from hyperclone_onnx.plan.plans import Feed, GrownDim, Interface, Plan
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.plan.strategies import Strategy
from hyperclone_onnx.planning.carriers import Tracer
from hyperclone_onnx.planning.request import Growth
from hyperclone_onnx.planning.sharing import Division, divide_sums
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
    dimensions, terms = growth.dimensions, growth.terms
    chosen = strategy or Strategy()
    _check_averages(dimensions, terms)
    division = divide_sums(growth, untie)
    tensors, feeds = _tensors(growth, division, chosen)
    edits = [*division.edits, *_node_edits(growth, terms)]
    roles = {dim.name: dim.role for dim in growth.named}
    return Plan(
        dims={name: GrownDim(roles[name], source_map) for name, source_map in growth.maps.values()},
        tensors=tensors,
        feeds=tuple(feeds),
        edits=tuple(edits),
        inputs=tuple(_interface(dimensions.model.graph.inputs, growth)),
        outputs=tuple(_interface(dimensions.model.graph.outputs, growth)),
        strategy=chosen,
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


def _tensors(growth: Growth, division: Division, strategy: Strategy) -> tuple[dict[str, Recipe], list[Feed]]:
    """A recipe for each tensor that changes, and the uses that read another tensor than before."""
    dimensions, terms = growth.dimensions, growth.terms
    names = list(dimensions.model.graph.initializers)
    recipes: dict[str, dict[object, tuple[Recipe, list[Use]]]] = defaultdict(dict)
    for value, use, axes in dimensions.initializer_uses():
        name = value.name or ""
        recipe = _recipe(growth, division, strategy.law.origin(name, names), use, axes)
        key = (recipe.origin, terms.canonical(recipe.axes), recipe.shared, recipe.scale, recipe.bits)
        recipes[name].setdefault(key, (recipe, []))[1].append(use)
    tensors: dict[str, Recipe] = {}
    feeds: list[Feed] = []
    fresh = FreshNames(dimensions.model.graph)
    for name, variants in recipes.items():
        kept_elsewhere = _read_elsewhere(dimensions, name)
        ordered = sorted(variants.values(), key=lambda variant: not variant[0].is_trivial)
        for number, (recipe, uses) in enumerate(ordered):
            if number == 0 and not (kept_elsewhere and not recipe.is_trivial):
                if not recipe.is_trivial:
                    tensors[name] = recipe
                continue
            own = fresh.value(name)
            tensors[own] = recipe
            feeds.extend(Feed(node.name or "", index, own) for node, index in uses)
    return tensors, feeds


def _recipe(growth: Growth, division: Division, origin: Origin, use: Use, axes: Axes) -> Recipe:
    factors = growth.terms.recipe_axes(axes)
    shared = tuple(
        (axis, position)
        for axis in sorted(division.marks.get(use, ()))
        for position, factor in enumerate(factors[axis])
        if not isinstance(factor, Kept)
    )
    return Recipe(origin, factors, shared, division.scales.get(use, 1.0), growth.dimensions.packed.get(use))


def _read_elsewhere(dimensions: Dimensions, name: str) -> bool:
    """Whether a tensor is also read where no recipe reaches: in the body of an operator without a rule."""
    uses = [use for use in dimensions.model.graph.initializers[name].uses() if use.node not in dimensions.idle]
    return any((use.node, use.idx) not in dimensions.use_axes for use in uses)


def _interface(values: Iterable[ir.Value], growth: Growth) -> Iterable[Interface]:
    """The grown inputs or outputs."""
    terms = growth.terms
    for value in values:
        axes = growth.dimensions.axes.get(value) or ()
        if any(terms.grows(term) for term in axes):
            yield Interface(value.name or "", tuple(terms.factors(term) for term in axes))
