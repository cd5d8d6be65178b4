"""The table of operators: for each operator a function that computes it with the Python array API standard.

An implementation is one function ``f(xp, *inputs, **attributes)``. Its signature says the rest:

* A parameter annotated `Host` is a size or an index. It must be a Python number or a tuple of Python numbers.
* A keyword parameter is an attribute of the operator and has the operator's default.
* In some older opsets an input of today (``axes``) is an attribute. Then the parameter of that name takes it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Array = Any
"""An array of the framework to which the namespace `xp` belongs."""

Host = Any
"""A parameter that is computed on the host: a Python number, or a tuple of them."""

Implementation = Callable[..., Any]

INTERNAL = "hyperclone"
"""The domain of the operators that `fusions` puts in the place of several nodes."""

GIVEN = ("device", "opset", "outputs", "element_type")
"""Keyword parameters that are not attributes: the device of new arrays, the model's opset, the number of outputs that
are needed, and the ONNX type of the first input."""


@dataclass(frozen=True)
class Operator:
    """An implementation, and the properties that its signature states."""

    domain: str
    op_type: str
    function: Implementation
    inputs: tuple[str, ...]
    variadic: bool
    host: frozenset[str]
    keywords: frozenset[str]
    scalars: bool
    """Whether the implementation takes Python numbers in the place of stored scalars."""
    floats: tuple[tuple[str, float], ...]
    """Keyword parameters whose defaults are floats. The generated source writes them into each call. Otherwise
    torch.compile takes a default for an input, discovers that it must be constant, and starts again every time."""

    def is_host(self, position: int) -> bool:
        """Whether the input at a position is computed on the host."""
        return position < len(self.inputs) and self.inputs[position] in self.host


_operators: dict[tuple[str, str], Operator] = {}
_host: dict[str, Operator] = {}
_fast: dict[tuple[str, str, str], Implementation] = {}


def _describe(domain: str, op_type: str, function: Implementation, scalars: bool, skip: int) -> Operator:
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    positional = tuple(parameter.name for parameter in parameters if parameter.kind == parameter.POSITIONAL_OR_KEYWORD)
    host = frozenset(parameter.name for parameter in parameters if parameter.annotation in ("Host", "Host | None"))
    keywords = frozenset(parameter.name for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY)
    variadic = any(parameter.kind == parameter.VAR_POSITIONAL for parameter in parameters)
    floats = tuple(
        (parameter.name, parameter.default) for parameter in parameters if isinstance(parameter.default, float)
    )
    return Operator(domain, op_type, function, positional, variadic, host, keywords, scalars, floats)


def implements(*op_types: str, domain: str = "", scalars: bool = False) -> Callable[[Implementation], Implementation]:
    """Register the implementation of one or more operators."""

    def register(function: Implementation) -> Implementation:
        for op_type in op_types:
            if (domain, op_type) in _operators:
                raise ValueError(f"{op_type} is implemented already")
            _operators[domain, op_type] = _describe(domain, op_type, function, scalars, 1)
        return function

    return register


def on_host(*op_types: str) -> Callable[[Implementation], Implementation]:
    """Register a function that computes operators of the default domain with Python numbers."""

    def register(function: Implementation) -> Implementation:
        for op_type in op_types:
            _host[op_type] = _describe("", op_type, function, True, 0)
        return function

    return register


def faster(framework: str, *op_types: str, domain: str = "") -> Callable[[Implementation], Implementation]:
    """Register a faster implementation in one framework. It has the same signature and computes the same values."""

    def register(function: Implementation) -> Implementation:
        for op_type in op_types:
            _fast[framework, domain, op_type] = function
        return function

    return register


def operator(domain: str, op_type: str) -> Operator | None:
    """The table's entry for an operator, or None if the table lacks it."""
    return _operators.get((domain, op_type))


def host_operator(domain: str, op_type: str) -> Operator | None:
    """The entry that computes an operator with Python numbers, or None if there is none."""
    return None if domain else _host.get(op_type)


def host_operators() -> dict[str, Operator]:
    """All entries that compute operators with Python numbers, by operator."""
    return dict(_host)


def implementation(framework: str, domain: str, op_type: str) -> Implementation:
    """The function that computes an operator in a framework."""
    return _fast.get((framework, domain, op_type)) or _operators[domain, op_type].function


def covered() -> list[tuple[str, str]]:
    """Each (domain, operator) of the table, sorted."""
    return sorted(_operators)
