"""Reads the parts of a request as people write them in Python: a strategy by its name, 2.0 for 2, a role for maps."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from hyperclone_onnx.analysis.roles import NamedDim
from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.plan.maps import SourceMap
from hyperclone_onnx.plan.strategies import Strategy, StrategyRule


def strategy_of(given: Strategy | str | None) -> Strategy | None:
    """A strategy, from its name too.

    Raises:
        BadRequest: there is no strategy of that name, or what was given is neither.
    """
    if given is None or isinstance(given, Strategy):
        return given
    if not isinstance(given, str):
        raise BadRequest(f"the strategy is {given!r}: give its name, or Strategy(name, snr_db=..., seed=...)")
    try:
        return Strategy(given)
    except ValueError as problem:
        raise BadRequest(str(problem)) from problem


def rules_of(given: Sequence[StrategyRule]) -> tuple[StrategyRule, ...]:
    """The rules of single tensors.

    Raises:
        BadRequest: what was given is no sequence of rules.
    """
    rules = [given] if isinstance(given, StrategyRule) else given
    if isinstance(rules, str | Mapping) or not all(isinstance(rule, StrategyRule) for rule in rules):
        raise BadRequest("strategies is no list of rules: give [StrategyRule(role=..., name=...), ...]")
    return tuple(rules)


def whole_numbers(given: Mapping[str, Any] | None, argument: str, what: str) -> dict[str, int]:
    """Whole numbers by name. Numbers of other types that are whole, such as 2.0 and numpy's, are taken too.

    Args:
        given: the argument.
        argument: its name in Python.
        what: what each of its numbers is, for messages: "factor" or "size".

    Raises:
        BadRequest: it is no mapping from names to whole numbers.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise BadRequest(f'{argument} is {given!r}: give a {what} by role or dimension, such as {{"ffn": 2}}')
    return {_name(name, argument): _whole(name, number, what) for name, number in given.items()}


def _name(name: object, argument: str) -> str:
    if not isinstance(name, str):
        raise BadRequest(f"{argument} has the name {name!r}: give the name of a role or of a dimension as text")
    return name


def _whole(name: str, number: object, what: str) -> int:
    if isinstance(number, bool) or not isinstance(number, numbers.Real) or not float(number).is_integer():
        more = f", or the size that you want as sizes={{{name!r}: ...}}" if what == "factor" else ""
        raise BadRequest(f"the {what} of {name} is {number}: give a whole number{more}")
    return int(float(number)) if not isinstance(number, numbers.Integral) else int(number)


def maps_of(named: Sequence[NamedDim], given: Mapping[str, SourceMap] | None) -> dict[str, SourceMap]:
    """The source maps by the names of dimensions. A role stands for all its dimensions, where they have one size.

    Raises:
        BadRequest: it is no mapping to source maps, or the dimensions of a role differ in their sizes.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise BadRequest(
            f'maps is {given!r}: give source maps by dimension, such as {{"hidden": SourceMap(4, tile=2)}}'
        )
    names = {dimension.name for dimension in named}
    labels = {dimension.label: dimension.name for dimension in named if dimension.label}
    by_role: dict[str, SourceMap] = {}
    by_name: dict[str, SourceMap] = {}
    for asked, source_map in given.items():
        name = labels.get(_name(asked, "maps"), asked)
        if not isinstance(source_map, SourceMap):
            raise BadRequest(f"the map of {name} is {source_map!r}: give a SourceMap, such as SourceMap(4, tile=2)")
        of_role = [dimension for dimension in named if dimension.role == name]
        if name in names or not of_role:
            by_name[name] = source_map
            continue
        others = [dimension for dimension in of_role if dimension.size != source_map.size]
        if others:
            raise BadRequest(
                f"the map of {name} is for size {source_map.size}, and {others[0].name} has size {others[0].size}: "
                "give maps by the names of dimensions (`inspect` lists them)"
            )
        by_role |= {dimension.name: source_map for dimension in of_role}
    return by_role | by_name
