"""Gives single tensors another strategy than the rest of the model."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.plan.maps import Axis, ConcatOf, Named, ProductOf
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.plan.strategies import Strategy, StrategyRule
from hyperclone_onnx.planning.request import Growth


def with_rules(growth: Growth, plan: Plan, rules: Sequence[StrategyRule]) -> Plan:
    """The plan, in which rules give some tensors another strategy. Of several rules that fit, the first decides.

    Raises:
        BadRequest: a rule is for no tensor whose repeats share a weight, or its numbers are out of range.
    """
    if not rules:
        return plan
    labels = {dimension.label: dimension.name for dimension in growth.named if dimension.label}
    names = list(growth.dimensions.model.graph.initializers)
    strategies: dict[str, Strategy] = {}
    tensors = dict(plan.tensors)
    unused = list(rules)
    for tensor, recipe in plan.tensors.items():
        dimensions = set(_shared(recipe)) if recipe.shared else set()
        if not dimensions:
            continue
        fitting = [rule for rule in rules if _fits(rule, tensor, recipe, dimensions, plan, labels)]
        unused = [rule for rule in unused if rule not in fitting]
        if not fitting:
            continue
        try:
            strategy = fitting[0].strategy(plan.strategy)
        except ValueError as problem:
            raise BadRequest(f"{_called(fitting[0])}: {problem}") from problem
        if strategy != plan.strategy:
            strategies[tensor] = strategy
            if isinstance(recipe.origin, str):
                tensors[tensor] = replace(recipe, origin=strategy.law.origin(recipe.origin, names))
    if unused:
        raise BadRequest(
            f"{_called(unused[0])} fits no tensor whose repeats share a weight in this growth (`inspect` lists tensors "
            "and dimensions)"
        )
    return replace(plan, strategies=strategies, tensors=tensors)


def _fits(
    rule: StrategyRule, tensor: str, recipe: Recipe, dimensions: set[str], plan: Plan, labels: dict[str, str]
) -> bool:
    if rule.tensor is not None:
        return any(fnmatch.fnmatchcase(name, rule.tensor) for name in (tensor, *recipe.sources))
    if rule.dimension is not None:
        return labels.get(rule.dimension, rule.dimension) in dimensions
    role = "heads" if rule.role == "kv_heads" else rule.role
    return any(plan.dims[name].role == role for name in dimensions)


def _shared(recipe: Recipe) -> Iterator[str]:
    """The dimensions along which the repeats of a tensor share it."""
    for axis, factor in recipe.shared:
        yield from _names(recipe.axes[axis][factor])


def _names(axis: Axis) -> Iterator[str]:
    match axis:
        case Named(name):
            yield name
        case ProductOf(parts) | ConcatOf(parts):
            for part in parts:
                yield from _names(part)


def _called(rule: StrategyRule) -> str:
    what = next((kind, value) for kind, value in rule.to_json().items())
    place = f"{rule.place}: " if rule.place else ""
    return f"{place}the strategy for {what[0]} {what[1]!r}"
