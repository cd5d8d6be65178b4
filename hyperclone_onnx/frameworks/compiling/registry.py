"""The one table of operators: what each computes, in the terms of the Python array API standard.

An implementation is one function ``f(xp, *inputs, **attributes)``. Its signature says the rest: parameters annotated
`Host` are sizes and indices that must be plain Python numbers (or tuples of them); keyword parameters are the
operator's attributes with the operator's defaults. An attribute of an older opset that has become an input (``axes``)
is given to the parameter of that name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Array = Any
"""An array of whatever framework the namespace `xp` is of."""

Host = Any
"""A parameter that is computed on the host: a Python number, or a tuple of them."""

Implementation = Callable[..., Any]

INTERNAL = "hyperclone"
"""The domain of what `fusions` makes of several nodes."""

GIVEN = ("device", "opset", "outputs", "element_type")
"""Keyword parameters that are no attributes: where to create, the opset in force, how many outputs are wanted, and the
ONNX type of the first input."""


@dataclass(frozen=True)
class Operator:
    """An implementation, and what its signature says of it."""

    domain: str
    op_type: str
    function: Implementation
    inputs: tuple[str, ...]
    variadic: bool
    host: frozenset[str]
    keywords: frozenset[str]
    scalars: bool
    """Whether Python numbers may stand in for stored scalars."""
    floats: tuple[tuple[str, float], ...]
    """Keyword parameters whose defaults are floats. A call spells them out: torch.compile takes a default for an input,
    finds that it must be known, and starts again, for each of them."""

    def is_host(self, position: int) -> bool:
        """Whether the input at a position is computed on the host."""
        return position < len(self.inputs) and self.inputs[position] in self.host


_operators: dict[tuple[str, str], Operator] = {}
_host: dict[str, Operator] = {}
_fast: dict[tuple[str, str, str], Implementation] = {}


def _describe(domain: str, op_type: str, function: Implementation, scalars: bool, skip: int) -> Operator:
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    positional = tuple(each.name for each in parameters if each.kind == each.POSITIONAL_OR_KEYWORD)
    host = frozenset(each.name for each in parameters if each.annotation in ("Host", "Host | None"))
    keywords = frozenset(each.name for each in parameters if each.kind == each.KEYWORD_ONLY)
    variadic = any(each.kind == each.VAR_POSITIONAL for each in parameters)
    floats = tuple((each.name, each.default) for each in parameters if isinstance(each.default, float))
    return Operator(domain, op_type, function, positional, variadic, host, keywords, scalars, floats)


def implements(*op_types: str, domain: str = "", scalars: bool = False) -> Callable[[Implementation], Implementation]:
    """Register what one or more operators compute."""

    def register(function: Implementation) -> Implementation:
        for op_type in op_types:
            if (domain, op_type) in _operators:
                raise ValueError(f"{op_type} is implemented already")
            _operators[domain, op_type] = _describe(domain, op_type, function, scalars, 1)
        return function

    return register


def on_host(*op_types: str) -> Callable[[Implementation], Implementation]:
    """Register what one or more operators of the default domain compute of Python numbers."""

    def register(function: Implementation) -> Implementation:
        for op_type in op_types:
            _host[op_type] = _describe("", op_type, function, True, 0)
        return function

    return register


def faster(framework: str, *op_types: str, domain: str = "") -> Callable[[Implementation], Implementation]:
    """Register a framework's own, faster way to the same values, with the same signature."""

    def register(function: Implementation) -> Implementation:
        for op_type in op_types:
            _fast[framework, domain, op_type] = function
        return function

    return register


def operator(domain: str, op_type: str) -> Operator | None:
    """An operator of the table, None when it is not covered."""
    return _operators.get((domain, op_type))


def host_operator(domain: str, op_type: str) -> Operator | None:
    """An operator's form for Python numbers, None when it has none."""
    return None if domain else _host.get(op_type)


def host_operators() -> dict[str, Operator]:
    """Every operator's form for Python numbers."""
    return dict(_host)


def implementation(framework: str, domain: str, op_type: str) -> Implementation:
    """What runs for an operator in a framework."""
    return _fast.get((framework, domain, op_type)) or _operators[domain, op_type].function


def covered() -> list[tuple[str, str]]:
    """Every (domain, operator) of the table."""
    return sorted(_operators)
