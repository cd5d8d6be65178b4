"""Solve linear equations between the logarithms of factors, so that few tensors change.

The unknown x of a stored tensor is the logarithm of the factor by which the tensor is multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hyperclone_onnx.errors import Refused

NEAR = 2e-4
"""The largest difference that we attribute to rounding.

For two signatures that should be in proportion it is relative to the largest element. For the logarithm of a scale it
is absolute.
"""


@dataclass(frozen=True)
class Equation:
    """The sum of ``coefficients[name] * x[name]`` must equal `constant`; `where` names the operator that demands it."""

    coefficients: Mapping[str, float]
    constant: float
    where: str


def solve(equations: Sequence[Equation], sizes: Mapping[str, int]) -> dict[str, float]:
    """Solve the equations by elimination, with x = 0 for every tensor that the equations leave free.

    In each equation we solve for the smallest tensor. So the factors go into few tensors, and into rather small ones.

    Args:
        equations: the equations of all operators. The same equation may occur many times.
        sizes: the number of elements of each tensor.

    Returns:
        The logarithm of the factor for each tensor that is not free.

    Raises:
        Refused: the equations contradict each other. The message names the operator whose equation fails.
    """
    pivots: dict[str, tuple[dict[str, float], float]] = {}
    seen: set[tuple[frozenset[tuple[str, float]], float]] = set()
    for equation in sorted(equations, key=lambda equation: (not equation.constant, len(equation.coefficients))):
        key = (frozenset(equation.coefficients.items()), round(equation.constant, 9))
        if key in seen:
            continue
        seen.add(key)
        row, constant = dict(equation.coefficients), equation.constant
        for name in list(row):
            if name in pivots and name in row:
                row, constant = _eliminated(row, constant, name, *pivots[name])
        row = {name: coefficient for name, coefficient in row.items() if abs(coefficient) > 1e-9}
        if not row:
            if abs(constant) > 5 * NEAR:
                raise Refused(
                    "the model multiplies by a constant that it derives from its sizes (off by "
                    f"{math.exp(abs(constant)):.4g} at {equation.where}), and no factor of a stored tensor compensates "
                    "it: grow other dimensions with --set"
                )
            continue
        chosen = min(row, key=lambda name: (sizes.get(name, 0), name))
        scale = row.pop(chosen)
        solved = {name: -coefficient / scale for name, coefficient in row.items()}, constant / scale
        for name, (others, value) in pivots.items():
            if chosen in others:
                factor = others.pop(chosen)
                for other, coefficient in solved[0].items():
                    others[other] = others.get(other, 0.0) + factor * coefficient
                pivots[name] = others, value + factor * solved[1]
        pivots[chosen] = solved
    return {name: value for name, (_, value) in pivots.items()}


def _eliminated(
    row: dict[str, float], constant: float, name: str, others: Mapping[str, float], value: float
) -> tuple[dict[str, float], float]:
    """The row after x[name] is replaced by the sum of ``others[other] * x[other]``, plus `value`."""
    coefficient = row.pop(name)
    for other, weight in others.items():
        row[other] = row.get(other, 0.0) + coefficient * weight
    return row, constant - coefficient * value
