"""Turns a request to shrink (a factor, sizes, lists of indices) into a map for each dimension that becomes smaller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

from hyperclone_onnx.analysis.roles import NamedDim, explain, name_dimensions
from hyperclone_onnx.errors import BadRequest, Refused
from hyperclone_onnx.plan.maps import SourceMap
from hyperclone_onnx.planning.request import GROWN_BY_FACTOR, REQUIRED, Growth, kept_beside_others, unknown_name
from hyperclone_onnx.planning.sizes import known_names, solve_sizes
from hyperclone_onnx.rules.dimensions import Dimensions

Select = Literal["even", "first"]
Chosen = Mapping[str, Sequence[int]]
"""The indices that a dimension keeps, by its name or by a role."""


def pick(
    dimensions: Dimensions,
    factor: Fraction = Fraction(1),
    sizes: Mapping[str, int] | None = None,
    select: Select = "even",
    chosen: Chosen | None = None,
) -> Growth:
    """Turn a request to shrink into a map for each dimension.

    Args:
        dimensions: the dimensions of the large model.
        factor: the factor of the roles that growth by a factor changes, at most 1. It gives the nearest whole sizes.
        sizes: a size by role or by dimension. It replaces the factor.
        select: which indices of a dimension are kept.
        chosen: the indices that single dimensions keep, in the place of those that `select` gives.

    Raises:
        BadRequest: a size is above the source's, the model does not have a role or dimension, or a list of indices does
            not fit.
        Refused: a requested dimension must keep its size.
    """
    if not 0 < factor <= 1:
        raise BadRequest(f"the factor is {float(factor):g}: give one below 1 to shrink, such as 0.5, or use expand")
    named, lists, wanted = name_dimensions(dimensions), dict(chosen or {}), dict(sizes or {})
    _check_names(dimensions, named, {**wanted, **lists})
    growth = Growth(dimensions, named)
    kept = kept_beside_others(dimensions, named, lists.keys())
    targets = solve_sizes(dimensions, named, wanted, {}, kept, shrinks=True) if wanted else {}
    for dimension in named:
        size, target = dimension.size, targets.get(dimension.dim)
        given = lists.get(dimension.name, lists.get(dimension.called, lists.get(dimension.role)))
        asked = target is not None or given is not None
        by_factor = factor < 1 and dimension.role in GROWN_BY_FACTOR and not asked
        if by_factor and dimension.dim in kept:
            growth.beside.add(dimension.dim)
            continue
        small = (
            target.size if target is not None else max(1, int(size * factor + Fraction(1, 2))) if by_factor else size
        )
        source_map = _map(dimension, small, select, given)
        if source_map is None:
            continue
        if not dimension.dim.growable or dimension.dim.tied is not None:
            if asked or dimension.role in REQUIRED:
                raise Refused(_refusal(dimensions, dimension))
            continue
        if by_factor and small != size * factor:
            growth.rounded[dimension.name] = size * factor
        growth.maps[dimension.dim] = (dimension.name, source_map)
    return growth


def _map(dimension: NamedDim, small: int, select: Select, given: Sequence[int] | None) -> SourceMap | None:
    """The map of a dimension; None where it keeps its size."""
    if given is not None:
        if small != dimension.size and small != len(given):
            raise BadRequest(f"{dimension.called}: a list of {len(given)} indices, and a size of {small}")
        try:
            picked = SourceMap(dimension.size, pick=tuple(given))
        except ValueError as problem:
            raise BadRequest(f"the indices of {dimension.called}: {problem}") from problem
        return None if picked.grown == dimension.size and list(given) == list(range(dimension.size)) else picked
    if small == dimension.size:
        return None
    return SourceMap(dimension.size, first=small) if select == "first" else SourceMap(dimension.size, even=small)


def _check_names(dimensions: Dimensions, named: Sequence[NamedDim], asked: Mapping[str, object]) -> None:
    names = known_names(dimensions, named) | {dimension.role for dimension in named if dimension.role != "other"}
    roles = sorted({dimension.role for dimension in named} - {"other"})
    for name in asked:
        if name not in names:
            raise unknown_name(name, names, roles)
    for name, size in asked.items():
        if isinstance(size, int) and size < 1:
            raise BadRequest(f"the size of {name} is {size}: give a whole number above 0")


def _refusal(dimensions: Dimensions, dimension: NamedDim) -> str:
    reason = (
        "it is joined with others and then divided into groups"
        if dimension.dim.tied is not None
        else explain(dimensions, dimension.dim)
    )
    return (
        f"{dimension.name} (size {dimension.size}) cannot become smaller: {reason}. Leave it out, and give --size for "
        "the others"
    )
