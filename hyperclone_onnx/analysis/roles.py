"""Gives dimensions roles and names, from what happens to them in the graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Dim
from hyperclone_onnx.analysis.walk import atoms_in_order
from hyperclone_onnx.graphs import MOVES_OR_CASTS
from hyperclone_onnx.rules.dimensions import Dimensions, Fact


@dataclass(frozen=True)
class NamedDim:
    """An atomic dimension, the role that its uses give it, and a name that no other dimension of the model has."""

    dim: Dim
    role: str
    name: str
    label: str = ""
    """The name for people, where it differs: in grouped attention, a dimension of the role "heads" numbers the
    key/value heads, and people mean the query heads by that word. Empty where it is `name`."""

    @property
    def called(self) -> str:
        """The name for people."""
        return self.label or self.name

    @property
    def size(self) -> int:
        """The size of the dimension in the source model."""
        return self.dim.size.static_or(0)


def name_dimensions(dimensions: Dimensions) -> list[NamedDim]:
    """The role and the name of every atomic dimension, in the order in which the graph shows them."""
    facts = _facts_by_atom(dimensions)
    batches = _head_batches(dimensions, facts)
    groups = _head_groups(dimensions, batches)
    by_role: dict[str, list[Dim]] = defaultdict(list)
    order: list[tuple[Dim, str]] = []
    vocabulary = _vocabulary(dimensions)
    for atom in atoms_in_order(dimensions):
        role = _role(atom, facts.get(atom, frozenset()), groups, vocabulary)
        by_role[role].append(atom)
        order.append((atom, role))
    numbers = {atom: number for atoms in by_role.values() for number, atom in enumerate(atoms)}
    grouped = {atom for batch in batches if not groups.isdisjoint(batch) for atom in batch} - groups

    def name(atom: Dim, role: str, word: str) -> str:
        return word if len(by_role[role]) == 1 else f"{word}.{numbers[atom]}"

    return [
        NamedDim(
            atom,
            role,
            name(atom, role, role),
            name(atom, role, "kv_heads") if role == "heads" and atom in grouped else "",
        )
        for atom, role in order
    ]


def head_batches(dimensions: Dimensions) -> list[tuple[Dim, ...]]:
    """For each attention, the dimensions that number its heads, outermost first. Each combination is there once."""
    return _head_batches(dimensions, _facts_by_atom(dimensions))


def _facts_by_atom(dimensions: Dimensions) -> dict[Dim, frozenset[Fact]]:
    """What happens to each dimension, without the facts that would be misleading."""
    by_atom: dict[Dim, set[Fact]] = defaultdict(set)
    space = dimensions.space
    # A free axis of a contraction belongs to a head only where the batch axes are heads, which weights make. In a
    # state-space model they are not, even where the size of its batch is fixed.
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
                    by_atom[atom].add(kind)
    # A residual stream that is contracted with another one (the similarity of two encoders) is no head either.
    inside = {
        atom
        for t, node in dimensions.facts[Fact.CONTRACTED_WITH_ACTIVATION]
        if node in headed
        for atom in space.atoms(t)
    }
    for atom, kinds in by_atom.items():
        if atom not in inside and {Fact.CONTRACTED_WITH_WEIGHT, Fact.NORMALISED} <= kinds:
            kinds.discard(Fact.CONTRACTED_WITH_ACTIVATION)
    return {atom: frozenset(kinds) for atom, kinds in by_atom.items()}


def _head_batches(dimensions: Dimensions, facts: Mapping[Dim, frozenset[Fact]]) -> list[tuple[Dim, ...]]:
    space = dimensions.space
    per_node: dict[object, list[Dim]] = defaultdict(list)
    for term, node in dimensions.facts[Fact.BATCHED]:
        per_node[node].extend(atom for atom in space.atoms(term) if _is_weighted(facts[atom]))
    return list(dict.fromkeys(tuple(atoms) for atoms in per_node.values()))


def _head_groups(dimensions: Dimensions, batches: Iterable[tuple[Dim, ...]]) -> set[Dim]:
    """The axes of heads along which keys and values are only repeated (grouped-query attention).

    The batch axis of such an attention is (key/value heads, group). In a multi-query model the whole batch axis is
    repeated: it is the axis of the query heads, and no group.
    """
    space = dimensions.space
    repeated = {
        resolved for term, _ in dimensions.facts[Fact.EXPANDED] if isinstance(resolved := space.resolve(term), Dim)
    }
    groups: set[Dim] = set()
    for batch in batches:
        inner = [atom for atom in batch if atom in repeated]
        groups.update(inner if len(inner) < len(batch) else inner[1:])
    return groups


def _is_weighted(facts: frozenset[Fact]) -> bool:
    """Whether a weight has the axis."""
    return not facts.isdisjoint({Fact.CONTRACTED_WITH_WEIGHT, Fact.WEIGHT_OUTPUT})


def _role(atom: Dim, facts: frozenset[Fact], groups: set[Dim], vocabulary: set[Dim]) -> str:
    """The role of a dimension; see "Roles" in docs/design.md."""
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
        if atom.pin is not None and not atom.pin.gap and facts.isdisjoint(_MADE_BY_WEIGHTS):
            return "width"  # The features of an input, which may be normalised: the pixels of a patch.
        if not facts.isdisjoint({Fact.NORMALISED, Fact.EMBEDDING, Fact.STATE}):
            return "hidden"
        return "ffn" if Fact.WEIGHT_OUTPUT in facts else "width"
    lost = Fact.WEIGHT_OUTPUT in facts and atom.pin is not None and atom.pin.gap
    return "width" if lost else "other"


_MADE_BY_WEIGHTS = frozenset([Fact.WEIGHT_OUTPUT, Fact.EMBEDDING, Fact.STATE])


def _is_a_count(facts: frozenset[Fact]) -> bool:
    """Whether an axis numbers places, or choices such as the experts of a router. Then it is no width of the model."""
    stream = not facts.isdisjoint({Fact.NORMALISED, Fact.EMBEDDING, Fact.STATE})
    return Fact.SPATIAL in facts or (not stream and not facts.isdisjoint({Fact.SOFTMAX, Fact.CHOSEN}))


def _vocabulary(dimensions: Dimensions) -> set[Dim]:
    """The dimensions of the tables that integer inputs of the graph index, perhaps reshaped or converted before."""
    return {
        atom
        for indices, term in dimensions.index_tables
        if source_input(dimensions, indices) is not None
        for atom in dimensions.space.atoms(term)
    }


def source_input(dimensions: Dimensions, value: ir.Value) -> ir.Value | None:
    """The graph input that a value only reshapes or converts. None where the value is computed in another way."""
    while not (value.is_graph_input() and value in dimensions.model.graph.inputs):
        producer = value.producer()
        if producer is None or producer.domain or producer.op_type not in MOVES_OR_CASTS:
            return None
        origin = producer.inputs[0]
        if origin is None:
            return None
        value = origin
    return value


def explain(dimensions: Dimensions, dim: Dim, longest: int = 6) -> str:
    """Why a dimension is pinned: the reason, the node, and the chain of nodes that leads to that node."""
    if dim.pin is None:
        return "it is not pinned"
    space = dimensions.space
    start = space.first_related(dim.uid)
    chain = space.chain(start, dim.pin.origin)
    if len(chain) > longest:
        chain = [*chain[: longest // 2], f"... {len(chain) - longest} more ...", *chain[-longest // 2 :]]
    return str(dim.pin) + (f"; reached by way of {' -> '.join(chain)}" if chain else "")
