"""Linear equations between the logarithms of factors, and a solution that changes little."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hyperclone_onnx.errors import Refused

NEAR = 2e-4
"""How far signatures may be from proportion, as a part of the largest element; a scale this near to one is one."""


@dataclass(frozen=True)
class Equation:
    """sum of coefficients * x = constant, and the operator that asks for it."""

    coefficients: Mapping[str, float]
    constant: float
    where: str


def solve(equations: Sequence[Equation], sizes: Mapping[str, int]) -> dict[str, float]:
    """A solution that changes few tensors, and rather small ones.

    Raises:
        Refused: there is none; the equation that contradicts the others is named.
    """
    pivots: dict[str, tuple[dict[str, float], float]] = {}
    seen: set[tuple[frozenset[tuple[str, float]], float]] = set()
    for equation in sorted(equations, key=lambda each: (not each.constant, len(each.coefficients))):
        key = (frozenset(equation.coefficients.items()), round(equation.constant, 9))
        if key in seen:
            continue
        seen.add(key)
        row, constant = dict(equation.coefficients), equation.constant
        for name in list(row):
            if name in pivots and name in row:
                row, constant = _eliminated(row, constant, name, *pivots[name])
        row = {name: each for name, each in row.items() if abs(each) > 1e-9}
        if not row:
            if abs(constant) > 5 * NEAR:
                raise Refused(
                    "the model multiplies by a constant that it derives from its sizes (off by "
                    f"{math.exp(abs(constant)):.4g} at {equation.where}), and no stored tensor can take it: "
                    "grow other dimensions with --set"
                )
            continue
        chosen = min(row, key=lambda name: (sizes.get(name, 0), name))
        scale = row.pop(chosen)
        solved = {name: -each / scale for name, each in row.items()}, constant / scale
        for name, (others, value) in pivots.items():
            if chosen in others:
                factor = others.pop(chosen)
                for other, each in solved[0].items():
                    others[other] = others.get(other, 0.0) + factor * each
                pivots[name] = others, value + factor * solved[1]
        pivots[chosen] = solved
    return {name: value for name, (_, value) in pivots.items()}


def _eliminated(
    row: dict[str, float], constant: float, name: str, others: Mapping[str, float], value: float
) -> tuple[dict[str, float], float]:
    """The row with x_name = sum of others * x + value put in."""
    coefficient = row.pop(name)
    for other, each in others.items():
        row[other] = row.get(other, 0.0) + coefficient * each
    return row, constant - coefficient * value
