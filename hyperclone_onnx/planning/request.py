"""From dimensions to a request's source maps: roles, names, and how much each dimension grows."""

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
"""The roles that ``--factor`` grows: HyperCloning's widths. Head sizes and head groups are kept."""

REQUIRED = ("hidden", "ffn", "heads")
"""The roles whose pinning refuses a request by factor. A `width` refuses it only where the rules have a gap: an
input's own width may keep its size in a grown model."""

LARGEST_FACTOR = 1 << 20


@dataclass
class Growth:
    """Which dimensions grow, and by which map."""

    dimensions: Dimensions
    named: list[NamedDim]
    maps: dict[Dim, tuple[str, SourceMap]] = field(default_factory=dict)
    beside: set[Dim] = field(default_factory=set)
    """Dimensions that keep their size because another factor of the same width grows."""

    @property
    def terms(self) -> GrownTerms:
        """The dimensions, read with these maps."""
        return GrownTerms(self.dimensions.space, self.maps)


def size(
    dimensions: Dimensions,
    factor: int = 1,
    requests: Mapping[str, int] | None = None,
    maps: Mapping[str, SourceMap] | None = None,
) -> Growth:
    """Turn a request into a source map for each dimension.

    Args:
        dimensions: what inference found.
        factor: the factor of the roles in `GROWN_BY_FACTOR`.
        requests: a factor for a role ("hidden") or for one dimension ("ffn.3"); overrides `factor`.
        maps: any source map for one dimension by name; overrides both.

    Raises:
        BadRequest: a factor below 1, or a role or dimension that the model has not.
        Refused: a requested dimension is pinned; the text gives the chain of nodes that pins it.
    """
    named = name_dimensions(dimensions)
    wanted = dict(requests or {})
    explicit = dict(maps or {})
    _check_request(named, factor, wanted, explicit)
    growth = Growth(dimensions, named)
    kept = _kept_beside_others(dimensions, named, wanted.keys() | explicit.keys())
    for each in named:
        asked = wanted.get(each.name, wanted.get(each.role))
        times = asked if asked is not None else factor if each.role in GROWN_BY_FACTOR else 1
        chosen = explicit.get(each.name) or SourceMap(each.size, tile=times)
        if chosen.grown == each.size:
            continue
        if each.dim in kept:
            growth.beside.add(each.dim)
            continue
        if not each.dim.growable:
            gap = each.dim.pin is not None and each.dim.pin.gap
            if asked is not None or each.name in explicit or each.role in REQUIRED or gap:
                raise Refused(refusal(dimensions, each, named))
            continue
        growth.maps[each.dim] = (each.name, chosen)
    _check_something_grows(growth, factor, wanted)
    return growth


WIDTHS = (Fact.CONTRACTED_WITH_WEIGHT, Fact.WEIGHT_OUTPUT, Fact.NORMALISED, Fact.EMBEDDING, Fact.BATCHED)
"""What is seen to happen to a whole axis, however many factors it has."""


def _kept_beside_others(dimensions: Dimensions, named: list[NamedDim], requested: Set[str]) -> set[Dim]:
    """The dimensions that keep their size because another factor of the same axis grows.

    A width that is reshaped (into groups of channels, windows, two factors) is still one width: a request for its
    role makes it `factor` times as wide, not once for each factor. The factor that grows is one that somewhere
    is a whole width by itself, else the outermost that does not number groups. Dimensions named one by one, and
    factors that are asked for as different roles, grow as asked.
    """
    space = dimensions.space
    keys = {
        each.dim: each.role if each.role in requested else ""
        for each in named
        if each.name not in requested and (each.role in requested or each.role in GROWN_BY_FACTOR)
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
    """What lies side by side along an axis, each as its atoms, outermost first; equal ones once.

    Of ``((a b) + c) d`` they are ``a b d`` and ``c d``.
    """
    resolved = space.resolve(term)
    if isinstance(resolved, Dim):
        return {(resolved,): None}
    if isinstance(resolved, Concat):
        return {width: None for segment in resolved.segments for width in _widths(space, segment)}
    parts = [_widths(space, factor) for factor in resolved.factors]
    return {tuple(itertools.chain(*chosen)): None for chosen in itertools.product(*parts)}


def _check_request(
    named: list[NamedDim], factor: int, requests: Mapping[str, int], maps: Mapping[str, SourceMap]
) -> None:
    if factor < 1:
        raise BadRequest(f"the factor is {factor}: give a whole number, 2 or more to grow")
    roles = sorted({each.role for each in named} - {"other"})
    for name, times in (("--factor", factor), *requests.items()):
        if times > LARGEST_FACTOR:
            raise BadRequest(f"{name} {times}: no model grows that far; give a factor up to {LARGEST_FACTOR}")
    names = {each.name for each in named if each.role != "other"} | set(roles)
    for name in (*requests, *maps):
        if name not in names:
            near = difflib.get_close_matches(name, sorted(names), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(roles) or 'none'}"
            raise BadRequest(f"this model has no dimension {name!r}{hint} (`inspect` lists them)")
    for name, times in requests.items():
        if times < 1:
            raise BadRequest(f"the factor of {name} is {times}: give a whole number, 1 to keep its size")
    for name, chosen in maps.items():
        size = next((each.size for each in named if each.name == name), None)
        if size != chosen.size:
            raise BadRequest(f"the map of {name} is for size {chosen.size}, the dimension has size {size}")


def _check_something_grows(growth: Growth, factor: int, requests: Mapping[str, int]) -> None:
    if growth.maps or (factor == 1 and all(times == 1 for times in requests.values())):
        return
    unruled = growth.dimensions.unruled
    if unruled:
        listed = ", ".join(f"{name} x{len(nodes)}" for name, nodes in sorted(unruled.items()))
        raise Refused(f"nothing in this model can grow: its weights are met by operators without a rule ({listed})")
    pinned = [each for each in growth.named if each.dim.pin is not None and each.dim.pin.gap]
    if pinned:
        raise Refused(refusal(growth.dimensions, pinned[0], growth.named))
    raise NothingGrows("nothing in this model can grow: no weight that may grow is contracted with an activation")


def refusal(dimensions: Dimensions, each: NamedDim, named: list[NamedDim]) -> str:
    """The text that says why a dimension cannot grow, and what to do."""
    reason = explain(dimensions, each.dim)
    keep = f"--set {each.name}=1" if any(other.name != each.name for other in named) else "a smaller request"
    return f"{each.name} (size {each.size}) cannot grow: {reason}. To keep its size and grow the rest: {keep}"
