"""From dimensions to a request's source maps: roles, names, and how much each dimension grows."""

from __future__ import annotations

import difflib
import itertools
from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Concat, Dim, Space, Term
from hyperclone_onnx.analysis.walk import Dimensions, Fact, atoms_in_order
from hyperclone_onnx.errors import BadRequest, NothingGrows, Refused
from hyperclone_onnx.plan.maps import SourceMap

GROWN_BY_FACTOR = ("hidden", "ffn", "heads", "width")
"""The roles that ``--factor`` grows: HyperCloning's widths. Head sizes and head groups are kept."""

REQUIRED = ("hidden", "ffn", "heads")
"""The roles whose pinning refuses a request by factor. A `width` refuses it only where the rules have a gap: an
input's own width may keep its size in a grown model."""

LARGEST_FACTOR = 1 << 20


@dataclass(frozen=True)
class NamedDim:
    """An atomic dimension with the role its uses give it and a name that is unique in the model."""

    dim: Dim
    role: str
    name: str

    @property
    def size(self) -> int:
        """Its size in the source model."""
        return self.dim.size.static_or(0)


@dataclass
class Growth:
    """Which dimensions grow, and by which map."""

    dimensions: Dimensions
    named: list[NamedDim]
    maps: dict[Dim, tuple[str, SourceMap]] = field(default_factory=dict)
    beside: set[Dim] = field(default_factory=set)
    """Dimensions that keep their size because another factor of the same width grows."""


def name_dimensions(dimensions: Dimensions) -> list[NamedDim]:
    """Give every atomic dimension a role and a name, in order of appearance."""
    facts = _facts_by_atom(dimensions)
    groups = _head_groups(dimensions, facts)
    by_role: dict[str, list[Dim]] = defaultdict(list)
    order: list[tuple[Dim, str]] = []
    vocabulary = _vocabulary(dimensions)
    for atom in atoms_in_order(dimensions):
        role = _role(atom, facts.get(atom, frozenset()), groups, vocabulary)
        by_role[role].append(atom)
        order.append((atom, role))
    numbers = {atom: number for atoms in by_role.values() for number, atom in enumerate(atoms)}
    return [
        NamedDim(atom, role, role if len(by_role[role]) == 1 else f"{role}.{numbers[atom]}") for atom, role in order
    ]


def _facts_by_atom(dimensions: Dimensions) -> dict[Dim, frozenset[Fact]]:
    found: dict[Dim, set[Fact]] = defaultdict(set)
    space = dimensions.space
    # A free axis belongs to a head only where heads that weights make batch the contraction (in a state-space model
    # none do, in whatever sizes its batch is fixed).
    weighted = {
        atom
        for kind in (Fact.CONTRACTED_WITH_WEIGHT, Fact.WEIGHT_OUTPUT)
        for term, _ in dimensions.facts[kind]
        for atom in space.atoms(term)
    }
    headed = {
        node
        for term, node in dimensions.facts[Fact.BATCHED]
        if any(atom in weighted and space.static(atom) is not None for atom in space.atoms(term))
    }
    for kind, sightings in dimensions.facts.items():
        for term, node in sightings:
            if kind is not Fact.VALUE_AXIS or node in headed:
                for atom in space.atoms(term):
                    found[atom].add(kind)
    # A residual stream that meets another one (a similarity of two encoders) is no head either.
    inside = {
        atom
        for t, node in dimensions.facts[Fact.CONTRACTED_WITH_ACTIVATION]
        if node in headed
        for atom in space.atoms(t)
    }
    for atom, kinds in found.items():
        if atom not in inside and {Fact.CONTRACTED_WITH_WEIGHT, Fact.NORMALISED} <= kinds:
            kinds.discard(Fact.CONTRACTED_WITH_ACTIVATION)
    return {atom: frozenset(kinds) for atom, kinds in found.items()}


def _head_groups(dimensions: Dimensions, facts: Mapping[Dim, frozenset[Fact]]) -> set[Dim]:
    """The head axes along which keys and values are only repeated (grouped-query attention).

    The batch axis of such an attention is (key/value heads, group). An axis that is all repetition is the query
    heads of a multi-query model: those are heads.
    """
    space = dimensions.space
    repeated = {
        resolved for term, _ in dimensions.facts[Fact.EXPANDED] if isinstance(resolved := space.resolve(term), Dim)
    }
    groups: set[Dim] = set()
    batches: dict[tuple[Dim, ...], None] = {}
    per_node: dict[object, list[Dim]] = defaultdict(list)
    for term, node in dimensions.facts[Fact.BATCHED]:
        per_node[node].extend(atom for atom in space.atoms(term) if _is_weighted(facts[atom]))
    for atoms in per_node.values():
        batches.setdefault(tuple(atoms))
    for batch in batches:
        inner = [atom for atom in batch if atom in repeated]
        groups.update(inner if len(inner) < len(batch) else inner[1:])
    return groups


def _is_weighted(facts: frozenset[Fact]) -> bool:
    return not facts.isdisjoint({Fact.CONTRACTED_WITH_WEIGHT, Fact.WEIGHT_OUTPUT})


def _role(atom: Dim, facts: frozenset[Fact], groups: set[Dim], vocabulary: set[Dim]) -> str:
    stream = Fact.CONTRACTED_WITH_WEIGHT in facts and not facts.isdisjoint({Fact.NORMALISED, Fact.EMBEDDING})
    if Fact.INDEXED in facts and not stream:
        return "vocab" if atom in vocabulary else "positions"
    if Fact.SOFTMAX in facts and not _is_weighted(facts):
        return "positions"
    if _is_weighted(facts) and atom.pin is not None and not atom.pin.gap and _is_a_count(facts):
        return "width"
    if _is_weighted(facts):
        if Fact.BATCHED in facts:
            return "group" if atom in groups else "heads"
        if not facts.isdisjoint({Fact.CONTRACTED_WITH_ACTIVATION, Fact.VALUE_AXIS}):
            return "head_dim"
    if Fact.CONTRACTED_WITH_WEIGHT in facts:
        if not facts.isdisjoint({Fact.NORMALISED, Fact.EMBEDDING, Fact.STATE}):
            return "hidden"
        return "ffn" if Fact.WEIGHT_OUTPUT in facts else "width"
    lost = Fact.WEIGHT_OUTPUT in facts and atom.pin is not None and atom.pin.gap
    return "width" if lost else "other"


def _is_a_count(facts: frozenset[Fact]) -> bool:
    """Whether an axis numbers places or choices (a router's experts), so that it is no width of the model's own."""
    stream = not facts.isdisjoint({Fact.NORMALISED, Fact.EMBEDDING, Fact.STATE})
    return Fact.SPATIAL in facts or (not stream and not facts.isdisjoint({Fact.SOFTMAX, Fact.CHOSEN}))


def _vocabulary(dimensions: Dimensions) -> set[Dim]:
    """The tables that the graph's integer inputs index directly, or only reshaped or converted."""
    return {
        atom
        for indices, term in dimensions.index_tables
        if source_input(dimensions, indices) is not None
        for atom in dimensions.space.atoms(term)
    }


def source_input(dimensions: Dimensions, value: ir.Value) -> ir.Value | None:
    """The graph input whose very elements a value holds, None when it is computed from them."""
    while not (value.is_graph_input() and value in dimensions.model.graph.inputs):
        producer = value.producer()
        if producer is None or producer.domain or producer.op_type not in _MOVERS:
            return None
        origin = producer.inputs[0]
        if origin is None:
            return None
        value = origin
    return value


_MOVERS = frozenset(["Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"])


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


def explain(dimensions: Dimensions, dim: Dim, longest: int = 6) -> str:
    """Why a dimension is pinned: the reason, the node, and the chain of nodes that leads there."""
    if dim.pin is None:
        return "it is not pinned"
    space = dimensions.space
    start = space.first_related(dim.uid)
    chain = space.chain(start, dim.pin.origin)
    if len(chain) > longest:
        chain = [*chain[: longest // 2], f"... {len(chain) - longest} more ...", *chain[-longest // 2 :]]
    return str(dim.pin) + (f"; reached by way of {' -> '.join(chain)}" if chain else "")
