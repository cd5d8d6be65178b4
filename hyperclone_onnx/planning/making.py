"""Makes a plan from a growth: the recipes of tensors, the edits of nodes, the axes of inputs and outputs."""

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
    """Make the plan of a growth.

    Args:
        growth: the source map of each dimension.
        strategy: how repeats share a weight; by default `Strategy()`.
        untie: where two uses of one tensor need different recipes (a tied embedding), give each use its own tensor.
            Otherwise the tensor stays one, and scalars divide the sums.
        keep_interface: the graph's inputs and outputs keep the sizes of the source.

    Raises:
        Refused: a norm would average over unequally repeated parts, or a node cannot be edited. The text names the
            node.
    """
    dimensions, terms = growth.dimensions, growth.terms
    chosen = strategy or Strategy()
    division = divide_sums(growth, untie) if chosen.law.divides else Division()
    tensors, feeds = _tensors(growth, division, chosen)
    edits = [*division.edits, *_node_edits(growth, terms)]
    roles = {dim.name: dim.role for dim in growth.named}
    return Plan(
        dims={name: GrownDim(roles[name], source_map) for name, source_map in growth.maps.values()},
        tensors=tensors,
        feeds=tuple(feeds),
        edits=tuple(edits),
        inputs=tuple(_interface(dimensions.model.graph.inputs, growth, division)),
        outputs=tuple(_interface(dimensions.model.graph.outputs, growth, division)),
        strategy=chosen,
        keep_interface=keep_interface,
        stretched={
            value.name: {axis: tuple(powers) for axis, powers in axes.items()}
            for value, axes in division.stretches.values.items()
            if value.name and axes
        },
    )


def _node_edits(growth: Growth, terms: GrownTerms) -> Iterable[Edit]:
    dimensions = growth.dimensions
    for node in dimensions.walked:
        edit = registry.edit(node.domain, node.op_type)
        if edit is None or node in dimensions.unrelated or not _may_need_edit(dimensions, terms, node):
            continue
        op = GrownOp(dimensions, terms, node, opset_of(dimensions.model.graph, node.domain))
        try:
            edit(op)
        except Refused as problem:
            if describe(node) in str(problem):
                raise
            raise op.refuse(str(problem)) from problem
        yield from op.edits


def _may_need_edit(dimensions: Dimensions, terms: GrownTerms, node: ir.Node) -> bool:
    """Whether an input or output of a node grows, or the node has a body, in which something may grow."""
    axes_of_values: list[Axes | None] = [dimensions.axes_of(node, index) for index in range(len(node.inputs))]
    axes_of_values += [dimensions.axes.get(output) for output in node.outputs]
    has_body = any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values())
    return has_body or any(terms.grows(term) for axes in axes_of_values if axes for term in axes)


def _tensors(growth: Growth, division: Division, strategy: Strategy) -> tuple[dict[str, Recipe], list[Feed]]:
    """The recipes of all tensors that change, by name, and the uses that read another tensor than in the source."""
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
            second_name = fresh.value(name)
            tensors[second_name] = recipe
            feeds.extend(Feed(node.name or "", index, second_name) for node, index in uses)
    return tensors, feeds


def _recipe(growth: Growth, division: Division, origin: Origin, use: Use, axes: Axes) -> Recipe:
    factors = growth.terms.recipe_axes(axes, division.stretches.uses.get(use))
    shared = tuple(
        (axis, position)
        for axis in sorted(division.marks.get(use, ()))
        for position, factor in enumerate(factors[axis])
        if not isinstance(factor, Kept)
    )
    return Recipe(origin, factors, shared, division.scales.get(use, 1.0), growth.dimensions.packed.get(use))


def _read_elsewhere(dimensions: Dimensions, name: str) -> bool:
    """Whether a tensor is also read by a use without a recipe: in the body of an operator that has no rule."""
    uses = [use for use in dimensions.model.graph.initializers[name].uses() if use.node not in dimensions.never_run]
    return any((use.node, use.idx) not in dimensions.use_axes for use in uses)


def _interface(values: Iterable[ir.Value], growth: Growth, division: Division) -> Iterable[Interface]:
    """The axes of those inputs or outputs that grow."""
    terms = growth.terms
    for value in values:
        axes = growth.dimensions.axes.get(value) or ()
        if any(terms.grows(term) for term in axes):
            powers = division.stretches.values.get(value, {})
            factors = tuple(terms.factors(term, powers.get(axis)) for axis, term in enumerate(axes))
            yield Interface(value.name or "", factors)
