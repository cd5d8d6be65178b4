"""Turns a request (a factor, factors or sizes by role or name, maps) into a source map for each dimension."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from fractions import Fraction

from hyperclone_onnx.algebra.dims import Dim
from hyperclone_onnx.analysis.quantities import SIZE_ROLES, WIDTHS, widths_of
from hyperclone_onnx.analysis.roles import NamedDim, explain, name_dimensions
from hyperclone_onnx.errors import BadRequest, NothingGrows, Refused
from hyperclone_onnx.plan.maps import SourceMap
from hyperclone_onnx.planning.asked import maps_of
from hyperclone_onnx.planning.sizes import known_names, solve_sizes
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
    rounded: dict[str, Fraction] = field(default_factory=dict)
    """For dimensions that a fraction does not give a whole size: the size that the fraction would give."""

    @property
    def terms(self) -> GrownTerms:
        """The terms of the model, read with these maps."""
        return GrownTerms(self.dimensions.space, self.maps)


def size(
    dimensions: Dimensions,
    factor: float = 1,
    requests: Mapping[str, int] | None = None,
    maps: Mapping[str, SourceMap] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Growth:
    """Turn a request into a source map for each dimension.

    Args:
        dimensions: the dimensions that inference gives for the model.
        factor: the factor of the roles in `GROWN_BY_FACTOR`. A fraction gives each dimension the nearest whole size.
        requests: a factor for a role ("hidden") or for one dimension ("ffn.3"). It replaces `factor`.
        maps: any source map for one dimension, by its name, or for a role. It replaces all the others.
        sizes: a size for a role or for one dimension (see `planning.sizes`). It replaces both factors.

    Raises:
        BadRequest: a factor is below 1 or above `LARGEST_FACTOR`, the model does not have a requested role or
            dimension, a map has another size than its dimension, or a requested size does not fit.
        Refused: a requested dimension is pinned. The text gives the chain of nodes that pins it.
        NothingGrows: no weight of the model may grow.
    """
    named = name_dimensions(dimensions)
    times_all = whole_or_fraction(factor)
    factors = _with_plan_names(named, requests or {})
    explicit_maps = maps_of(named, maps)
    wanted = dict(sizes or {})
    _check_request(named, times_all, factors, explicit_maps)
    _check_sizes(dimensions, named, wanted, factors)
    growth = Growth(dimensions, named)
    kept = kept_beside_others(dimensions, named, factors.keys() | explicit_maps.keys())
    targets = solve_sizes(dimensions, named, wanted, factors, kept) if wanted else {}
    for dimension in named:
        requested = factors.get(dimension.name, factors.get(dimension.role))
        times = requested if requested is not None else times_all if dimension.role in GROWN_BY_FACTOR else 1
        target = targets.get(dimension.dim) if dimension.name not in factors else None
        explicit = explicit_maps.get(dimension.name)
        if explicit is None and target is not None:
            explicit = map_to(dimension.size, target.size)
        source_map = explicit or _map_by(dimension, times, growth)
        if source_map.grown == dimension.size:
            continue
        if dimension.dim in kept and target is None:
            growth.beside.add(dimension.dim)
            continue
        if not dimension.dim.growable:
            gap = dimension.dim.pin is not None and dimension.dim.pin.gap
            if requested is not None or explicit is not None or dimension.role in REQUIRED or gap:
                raise Refused(refusal(dimensions, dimension, named))
            continue
        growth.maps[dimension.dim] = (dimension.name, source_map)
    _repeat_tied(growth)
    stays = all(target.size == dim.size.static_or(0) for dim, target in targets.items())
    _check_something_grows(growth, times_all == 1 and stays and all(times == 1 for times in factors.values()))
    return growth


def whole_or_fraction(factor: float) -> int | Fraction:
    """A factor as an exact number: whole where it is whole. A float is read as it is printed, so 1.1 is 11 / 10.

    Raises:
        BadRequest: it is no number, or not finite.
    """
    if isinstance(factor, numbers.Rational):
        exact = Fraction(int(factor.numerator), int(factor.denominator))
    elif isinstance(factor, numbers.Real) and float(factor) - float(factor) == 0.0:
        exact = Fraction(repr(float(factor)))
    else:
        raise BadRequest(f"the factor is {factor!r}: give a number such as 2 or 1.5")
    return int(exact) if exact.denominator == 1 else exact


def map_to(size: int, grown: int) -> SourceMap:
    """The source map that repeats the indices of an axis in turn until it has a length."""
    if grown % max(size, 1) == 0:
        return SourceMap(size, tile=grown // max(size, 1))
    return SourceMap(size, cycle=grown)


def nearest_size(size: int, factor: Fraction) -> int:
    """The whole size that is nearest to a size times a factor. Of two that are equally near, it is the larger."""
    return max(size, int(size * factor + Fraction(1, 2)))


def _map_by(dimension: NamedDim, times: int | Fraction, growth: Growth) -> SourceMap:
    """The source map of a dimension that grows by a factor."""
    if isinstance(times, int):
        return SourceMap(dimension.size, tile=times)
    tied = dimension.dim.tied is not None
    grown = dimension.size * nearest_size(1, times) if tied else nearest_size(dimension.size, times)
    if grown != dimension.size * times and dimension.dim.growable:
        growth.rounded[dimension.name] = dimension.size * times
    return map_to(dimension.size, grown)


def _with_plan_names(named: list[NamedDim], requests: Mapping[str, int]) -> dict[str, int]:
    """The requested factors, with the names that plans have.

    A factor of the query heads and one of the key/value heads are the same request: the group keeps its size.

    Raises:
        BadRequest: the request has both, and they differ.
    """
    names = {dimension.label: dimension.name for dimension in named if dimension.label}
    if any(dimension.label for dimension in named):
        names["kv_heads"] = "heads"
    factors: dict[str, int] = {}
    for called, times in requests.items():
        name = names.get(called, called)
        if factors.setdefault(name, times) != times:
            raise BadRequest(
                f"{name} and {called} are one factor in grouped attention, and the request has two: to change the "
                "number of queries for each key/value head, give group, or sizes with --size"
            )
    return factors


def _repeat_tied(growth: Growth) -> None:
    """Let all tied dimensions grow if one of them grows, by repeats of each index in place.

    Raises:
        Refused: they are requested to grow by different factors or maps.
    """
    tied = [dimension for dimension in growth.named if dimension.dim.tied is not None and dimension.dim.growable]
    maps = [growth.maps[dimension.dim] for dimension in tied if dimension.dim in growth.maps]
    if not maps:
        return
    times = {source_map.grown // source_map.size for _, source_map in maps}
    parts = any(source_map.index or source_map.grown % source_map.size for _, source_map in maps)
    if len(times) > 1 or parts:
        names = ", ".join(name for name, _ in maps)
        raise Refused(f"{names} are joined and then divided into groups, so they must grow by one whole factor")
    for dimension in tied:
        growth.maps[dimension.dim] = (dimension.name, SourceMap(dimension.size, repeat=max(times)))
        growth.beside.discard(dimension.dim)


def kept_beside_others(dimensions: Dimensions, named: list[NamedDim], requested: Set[str]) -> set[Dim]:
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
            for width in widths_of(space, term):
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


def _check_request(
    named: list[NamedDim], factor: int | Fraction, requests: Mapping[str, int], maps: Mapping[str, SourceMap]
) -> None:
    if factor < 1:
        raise BadRequest(f"the factor is {_text(factor)}: give a number above 1 to grow, such as 2 or 1.5")
    roles = sorted({dimension.role for dimension in named} - {"other"})
    for name, times in (("--factor", factor), *requests.items()):
        if times > LARGEST_FACTOR:
            raise BadRequest(f"{name} {_text(times)}: no model grows that far; give a factor up to {LARGEST_FACTOR}")
    names = {dimension.name for dimension in named if dimension.role != "other"} | set(roles)
    for name in (*requests, *maps):
        if name not in names:
            raise unknown_name(name, names, roles)
    for name, times in requests.items():
        if times < 1:
            raise BadRequest(f"the factor of {name} is {times}: give a whole number, 1 to keep its size")
        _check_is_no_size(named, name, times)
    for name, source_map in maps.items():
        size = next((dimension.size for dimension in named if dimension.name == name), None)
        if size != source_map.size:
            raise BadRequest(f"the map of {name} is for size {source_map.size}, the dimension has size {size}")


LARGEST_LIKELY_FACTOR = 16
"""A larger factor for a role that is also larger than its size may be meant as a size."""


def _check_is_no_size(named: list[NamedDim], name: str, times: int) -> None:
    """Ask where a factor looks like a size: ``hidden=960`` for a width of 576.

    Raises:
        BadRequest: it does.
    """
    old = max((dimension.size for dimension in named if name in (dimension.name, dimension.role)), default=0)
    if times > LARGEST_LIKELY_FACTOR and times >= old:
        raise BadRequest(
            f"{name}={times} asks for {old:,} times {times:,}, which is {old * times:,}: you may mean "
            f"--size {name}={times}; if not, --size {name}={old * times}"
        )


def unknown_name(name: str, names: Set[str], roles: list[str]) -> BadRequest:
    """The error for a name that the model does not have."""
    if name == "layers":
        return BadRequest("layers are no dimension of a tensor: --layers N gives the number of layers")
    matches = difflib.get_close_matches(name, sorted(names), n=1)
    hint = f"; did you mean {matches[0]!r}?" if matches else f"; it has {', '.join(roles) or 'none'}"
    return BadRequest(f"this model has no dimension {name!r}{hint} (`inspect` lists them)")


def _text(factor: int | Fraction) -> str:
    return str(factor) if isinstance(factor, int) else f"{float(factor):g}"


def _check_sizes(
    dimensions: Dimensions, named: list[NamedDim], sizes: Mapping[str, int], requests: Mapping[str, int]
) -> None:
    """Check the names and the numbers of requested sizes.

    Raises:
        BadRequest: the model has no such dimension, a number is no size, or a name has a size and a factor.
    """
    if not sizes:
        return
    names = known_names(dimensions, named)
    roles = [role for role in SIZE_ROLES if role in names]
    for name, wanted in sizes.items():
        if name not in names:
            raise unknown_name(name, names, roles)
        if isinstance(wanted, bool) or not isinstance(wanted, numbers.Integral) or wanted < 1:
            raise BadRequest(f"the size of {name} is {wanted}: give a whole number above 0")
        if name in requests:
            raise BadRequest(f"{name} has a factor ({requests[name]}) and a size ({wanted}): leave one of the two out")


def _check_something_grows(growth: Growth, asked_for_nothing: bool) -> None:
    if growth.maps or asked_for_nothing:
        return
    if growth.rounded:
        name, exact = next(iter(growth.rounded.items()))
        raise BadRequest(
            f"nothing grows: the factor is so small that every size stays ({name} would be {float(exact):g}): give a "
            "larger factor, or a size with --size"
        )
    without_rule = growth.dimensions.without_rule
    if without_rule:
        listed = ", ".join(f"{name} x{len(nodes)}" for name, nodes in sorted(without_rule.items()))
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
