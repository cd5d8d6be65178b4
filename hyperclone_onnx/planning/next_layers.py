"""AKI of bert2BERT (Chen et al., arXiv 2110.07143): what is new in a layer computes what the next layer computes."""

from __future__ import annotations

import math
from dataclasses import replace

import onnx_ir as ir

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.layers.stacks import find_stacks
from hyperclone_onnx.plan.maps import FirstAndFurther, Kept, Maps, Named, source_size
from hyperclone_onnx.plan.origins import Joined
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.plan.recipes import Recipe


def with_next_layers(model: ir.Model, plan: Plan) -> Plan:
    """The plan, in which some laws take the extra copies of a tensor's outputs from the next layer.

    A tensor of the last layer, and one that has no counterpart in the next layer, takes its own. So does a tensor whose
    outputs are several dimensions that grow, such as queries, keys and values in one tensor, and one that is filled up
    with means.

    Raises:
        Refused: the graph has no layers, or there is no tensor that could take anything from the next one.
    """
    wanting = [name for name in plan.tensors if plan.strategy_of(name).law.extra_from_next_layer]
    if not wanting:
        return plan
    following = {
        own.name or "": other.name or ""
        for stack in find_stacks(model.graph)
        for unit, next_unit in zip(stack.units, stack.units[1:], strict=False)
        for own, other in zip(unit.stored, next_unit.stored, strict=True)
    }
    tensors = dict(plan.tensors)
    for name in wanting:
        recipe = plan.tensors[name]
        other = following.get(recipe.origin) if isinstance(recipe.origin, str) else None
        joined = None if other is None else _joined(recipe, other, plan.maps)
        if joined is not None:
            tensors[name] = joined
    if tensors == plan.tensors:
        law = plan.strategy_of(wanting[0]).name
        raise Refused(
            f"the strategy {law!r} takes extra copies from the next layer, and this graph has no layers whose tensors "
            "can take them: choose another strategy"
        )
    return replace(plan, tensors=tensors)


def from_next_layer(plan: Plan) -> int:
    """The number of tensors that take extra copies from the next layer."""
    return sum(
        isinstance(recipe.origin, Joined) and plan.strategy_of(name).law.extra_from_next_layer
        for name, recipe in plan.tensors.items()
    )


def _joined(recipe: Recipe, other: str, maps: Maps) -> Recipe | None:
    """The recipe of a stored tensor whose further outputs are another one's; None if these are no single dimension."""
    own = recipe.source
    growing = [
        (axis, position)
        for axis, factors in enumerate(recipe.axes)
        for position, factor in enumerate(factors)
        if not isinstance(factor, Kept) and (axis, position) not in recipe.shared
    ]
    if len(growing) != 1 or growing[0][1] != 0 or recipe.bits is not None:
        return None
    axis = growing[0][0]
    factor = recipe.axes[axis][0]
    if not isinstance(factor, Named) or factor.fill or any(shared_axis == axis for shared_axis, _ in recipe.shared):
        return None
    times = maps[factor.name].tile
    if times is None:
        two = (FirstAndFurther(factor.name, factor.power), *recipe.axes[axis][1:])
        axes = tuple(two if number == axis else factors for number, factors in enumerate(recipe.axes))
        return replace(recipe, origin=Joined((own, other), axis), axes=axes)
    length = math.prod(source_size(part, maps) for part in recipe.axes[axis])
    axes = tuple((Kept(length * times),) if number == axis else factors for number, factors in enumerate(recipe.axes))
    return replace(recipe, origin=Joined((own, *[other] * (times - 1)), axis), axes=axes)
