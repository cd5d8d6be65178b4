"""Turns a request (a factor, factors by role or name, maps) into a source map for each dimension."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from hyperclone_onnx.algebra.dims import Concat, Dim, Space, Term
from hyperclone_onnx.analysis.roles import NamedDim, explain, name_dimensions
from hyperclone_onnx.errors import BadRequest, NothingGrows, Refused
from hyperclone_onnx.plan.maps import SourceMap
from hyperclone_onnx.rules.dimensions import Dimensions, Fact
from hyperclone_onnx.rules.grown_terms import GrownTerms

GROWN_BY_FACTOR = ("hidden", "ffn", "heads", "width")
"""The roles that ``--factor`` grows: HyperCloning's widths. The size and the group of a head keep their sizes."""

REQUIRED = ("hidden", "ffn", "heads")
"""The roles that must be able to grow if the request gives a factor for the model.

A pinned `width` is no reason to refuse such a request, unless the reason of the pin is a gap in the rules. The width of
a graph input, for example, may keep its size in a grown model.
"""

LARGEST_FACTOR = 1 << 20
"""A larger factor is a mistake of the user."""


@dataclass
class Growth:
    """The dimensions that grow, and their source maps."""

    dimensions: Dimensions
    named: list[NamedDim]
    maps: dict[Dim, tuple[str, SourceMap]] = field(default_factory=dict)
    """(name, source map) of each dimension that grows."""
    beside: set[Dim] = field(default_factory=set)
    """Dimensions that keep their size because another factor of the same width grows."""

    @property
    def terms(self) -> GrownTerms:
        """The terms of the model, read with these maps."""
        return GrownTerms(self.dimensions.space, self.maps)


def size(
    dimensions: Dimensions,
    factor: int = 1,
    requests: Mapping[str, int] | None = None,
    maps: Mapping[str, SourceMap] | None = None,
) -> Growth:
    """Turn a request into a source map for each dimension.

    Args:
        dimensions: the dimensions that inference gives for the model.
        factor: the factor of the roles in `GROWN_BY_FACTOR`.
        requests: a factor for a role ("hidden") or for one dimension ("ffn.3"). It replaces `factor`.
        maps: any source map for one dimension, by its name. It replaces both.

    Raises:
        BadRequest: a factor is below 1 or above `LARGEST_FACTOR`, the model does not have a requested role or
            dimension, or a map has another size than its dimension.
        Refused: a requested dimension is pinned. The text gives the chain of nodes that pins it.
        NothingGrows: no weight of the model may grow.
    """
    named = name_dimensions(dimensions)
    factors = dict(requests or {})
    explicit_maps = dict(maps or {})
    _check_request(named, factor, factors, explicit_maps)
    growth = Growth(dimensions, named)
    kept = _kept_beside_others(dimensions, named, factors.keys() | explicit_maps.keys())
    for dimension in named:
        requested = factors.get(dimension.name, factors.get(dimension.role))
        times = requested if requested is not None else factor if dimension.role in GROWN_BY_FACTOR else 1
        source_map = explicit_maps.get(dimension.name) or SourceMap(dimension.size, tile=times)
        if source_map.grown == dimension.size:
            continue
        if dimension.dim in kept:
            growth.beside.add(dimension.dim)
            continue
        if not dimension.dim.growable:
            gap = dimension.dim.pin is not None and dimension.dim.pin.gap
            if requested is not None or dimension.name in explicit_maps or dimension.role in REQUIRED or gap:
                raise Refused(refusal(dimensions, dimension, named))
            continue
        growth.maps[dimension.dim] = (dimension.name, source_map)
    _check_something_grows(growth, factor, factors)
    return growth


WIDTHS = (Fact.CONTRACTED_WITH_WEIGHT, Fact.WEIGHT_OUTPUT, Fact.NORMALISED, Fact.EMBEDDING, Fact.BATCHED)
"""The facts that hold for an axis as a whole, however many factors it has."""


def _kept_beside_others(dimensions: Dimensions, named: list[NamedDim], requested: Set[str]) -> set[Dim]:
    """The dimensions that keep their size because another factor of the same axis grows.

    A width may be reshaped into several factors (groups of channels, windows). It is still one width: a request for its
    role multiplies the width by the requested factor once, and not once for each of its factors. So one of its factors
    grows. This is a factor that is a whole width elsewhere in the model. Without such a factor it is the outermost one
    that does not number groups. The rule does not apply to dimensions that are requested by their names, nor to factors
    that are requested as different roles.
    """
    space = dimensions.space
    keys = {
        dimension.dim: dimension.role if dimension.role in requested else ""
        for dimension in named
        if dimension.name not in requested and (dimension.role in requested or dimension.role in GROWN_BY_FACTOR)
    }
    grouped = {atom for term, _ in dimensions.facts[Fact.GROUPED] for atom in space.atoms(term)}
    composites: dict[tuple[Dim, ...], None] = {}
    for kind in WIDTHS:
        for term, _ in dimensions.facts[kind]:
            for width in _widths(space, term):
                for key in {keys[atom] for atom in width if atom in keys}:
                    composites.setdefault(tuple(atom for atom in width if keys.get(atom) == key))
    grows: set[Dim] = set()
    kept: set[Dim] = set()
    for composite in sorted(composites, key=len):
        if len(composite) == 1:
            grows.add(composite[0])
        elif grows.isdisjoint(composite):
            grows.add(next((atom for atom in composite if atom not in grouped), composite[0]))
        kept.update(composite)
    return kept - grows


def _widths(space: Space, term: Term) -> dict[tuple[Dim, ...], None]:
    """The widths that lie side by side along an axis, as the keys of a dict. Equal widths are one key.

    A width is given by its atoms, outermost first. The widths of ``((a b) + c) d`` are ``a b d`` and ``c d``.
    """
    resolved = space.resolve(term)
    if isinstance(resolved, Dim):
        return {(resolved,): None}
    if isinstance(resolved, Concat):
        return {width: None for segment in resolved.segments for width in _widths(space, segment)}
    parts = [_widths(space, factor) for factor in resolved.factors]
    return {tuple(itertools.chain(*atoms)): None for atoms in itertools.product(*parts)}


def _check_request(
    named: list[NamedDim], factor: int, requests: Mapping[str, int], maps: Mapping[str, SourceMap]
) -> None:
    if factor < 1:
        raise BadRequest(f"the factor is {factor}: give a whole number, 2 or more to grow")
    roles = sorted({dimension.role for dimension in named} - {"other"})
    for name, times in (("--factor", factor), *requests.items()):
        if times > LARGEST_FACTOR:
            raise BadRequest(f"{name} {times}: no model grows that far; give a factor up to {LARGEST_FACTOR}")
    names = {dimension.name for dimension in named if dimension.role != "other"} | set(roles)
    for name in (*requests, *maps):
        if name not in names:
            matches = difflib.get_close_matches(name, sorted(names), n=1)
            hint = f"; did you mean {matches[0]!r}?" if matches else f"; it has {', '.join(roles) or 'none'}"
            raise BadRequest(f"this model has no dimension {name!r}{hint} (`inspect` lists them)")
    for name, times in requests.items():
        if times < 1:
            raise BadRequest(f"the factor of {name} is {times}: give a whole number, 1 to keep its size")
    for name, source_map in maps.items():
        size = next((dimension.size for dimension in named if dimension.name == name), None)
        if size != source_map.size:
            raise BadRequest(f"the map of {name} is for size {source_map.size}, the dimension has size {size}")


def _check_something_grows(growth: Growth, factor: int, requests: Mapping[str, int]) -> None:
    if growth.maps or (factor == 1 and all(times == 1 for times in requests.values())):
        return
    unruled = growth.dimensions.unruled
    if unruled:
        listed = ", ".join(f"{name} x{len(nodes)}" for name, nodes in sorted(unruled.items()))
        raise Refused(f"nothing in this model can grow: its weights are met by operators without a rule ({listed})")
    pinned = [dimension for dimension in growth.named if dimension.dim.pin is not None and dimension.dim.pin.gap]
    if pinned:
        raise Refused(refusal(growth.dimensions, pinned[0], growth.named))
    raise NothingGrows("nothing in this model can grow: no weight that may grow is contracted with an activation")


def refusal(dimensions: Dimensions, dimension: NamedDim, named: list[NamedDim]) -> str:
    """The text that says why a dimension cannot grow, and what the user can do.

    Args:
        dimensions: all dimensions of the model.
        dimension: the dimension that cannot grow.
        named: the dimensions that have names.
    """
    reason = explain(dimensions, dimension.dim)
    has_others = any(other.name != dimension.name for other in named)
    keep = f"--set {dimension.name}=1" if has_others else "a smaller request"
    return f"{dimension.name} (size {dimension.size}) cannot grow: {reason}. To keep its size and grow the rest: {keep}"
