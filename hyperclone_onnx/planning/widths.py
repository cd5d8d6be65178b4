"""Any width under norms: which construction each averaged dimension gets, and what follows for the whole graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Dim
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.graphs import describe
from hyperclone_onnx.planning.averaging import Averaging, averaged
from hyperclone_onnx.planning.request import Growth
from hyperclone_onnx.planning.stretching import Stretches, Stretching
from hyperclone_onnx.planning.weighing import weighed
from hyperclone_onnx.rules.dimensions import Sum, Use


def stretch(growth: Growth, carried: Iterable[Sum], divided: Iterable[Sum], tied: Iterable[Sequence[Use]]) -> Stretches:
    """Decide which values are stretched.

    Args:
        growth: the source map of each dimension.
        carried: the sums that stored tensors divide.
        divided: the sums that numbers divide.
        tied: the uses of stored tensors that must stay one tensor.

    Raises:
        Refused: a node averages over unequally repeated indices, and no stretch makes the average right.
    """
    uneven, unlike = _uneven(growth), _unlike(growth)
    parts = _together([*uneven, *((node, atom) for node, dims in unlike.items() for atom in dims)])
    segments = set[Dim]().union(*unlike.values())
    total = Stretches()
    for part in [part for part in parts if not segments.isdisjoint(part)]:
        total = total.joined(_weighed_segments(growth, part, unlike))
        parts.remove(part)
    means = averaged(uneven)
    kinds: list[tuple[type[Stretching], set[Dim]]] = [(Averaging, means), (Stretching, {a for _, a in uneven} - means)]
    solver = _Solver(growth, list(carried), list(divided), list(tied))
    for kind, dims in kinds:
        for stretches in solver.solved(kind, [part & dims for part in parts if not dims.isdisjoint(part)]):
            total = total.joined(stretches)
    return total


def _weighed_segments(growth: Growth, dims: set[Dim], unlike: Mapping[ir.Node, set[Dim]]) -> Stretches:
    """The weights of averages over segments that do not grow alike: an average weighs them by their lengths.

    Raises:
        Refused: a node that averages over them cannot be written out.
    """
    edits = weighed(growth, dims)
    if edits is None:
        node = next(node for node, atoms in unlike.items() if not atoms.isdisjoint(dims))
        term = next(average.term for average in growth.dimensions.uniform if average.node is node)
        raise Refused(
            f"{describe(node)} averages over an axis whose parts would not grow equally "
            f"({growth.terms.written(term)}): give its parts one factor with --set"
        )
    return Stretches(edits=edits)


@dataclass(frozen=True)
class _Solver:
    """What is needed to decide which values are stretched along some of the dimensions."""

    growth: Growth
    carried: list[Sum]
    divided: list[Sum]
    tied: list[Sequence[Use]]

    def solved(self, kind: type[Stretching], parts: list[set[Dim]]) -> list[Stretches]:
        """The stretches along several sets of dimensions; where there are none, the averages are weighed.

        Args:
            kind: the construction that keeps the averages.
            parts: sets of dimensions. The dimensions of different sets are not averaged together.

        Raises:
            Refused: neither is possible.
        """
        dims = set[Dim]().union(*parts)
        if not dims:
            return []
        try:
            return [self._stretched(kind, dims)]
        except Refused:
            if len(parts) > 1:
                return [stretches for part in parts for stretches in self.solved(kind, [part])]
            edits = weighed(self.growth, dims)
            if edits is None:
                raise
            return [Stretches(edits=edits)]

    def _stretched(self, kind: type[Stretching], dims: set[Dim]) -> Stretches:
        stretching = kind(self.growth, dims, self.carried, self.divided)
        stretching.check()
        for uses in self.tied:
            stretching.tie(uses)
        stretching.relate()
        return stretching.solved()


def _together(uneven: Iterable[tuple[ir.Node, Dim]]) -> list[set[Dim]]:
    """The dimensions as sets: those that one node averages over together are in one set."""
    by_node: dict[ir.Node, set[Dim]] = defaultdict(set)
    for node, atom in uneven:
        by_node[node].add(atom)
    parts: list[set[Dim]] = []
    for dims in by_node.values():
        joined = [part for part in parts if not part.isdisjoint(dims)]
        parts = [part for part in parts if part not in joined]
        parts.append(dims.union(*joined))
    return parts


def _uneven(growth: Growth) -> dict[tuple[ir.Node, Dim], None]:
    """The dimensions that a node averages over, and whose indices are repeated unequally, with the node."""
    uneven: dict[tuple[ir.Node, Dim], None] = {}
    for average in growth.dimensions.uniform:
        for atom in growth.terms.leaves(average.term):
            if not growth.maps[atom][1].is_even:
                uneven[average.node, atom] = None
    return uneven


def _unlike(growth: Growth) -> dict[ir.Node, set[Dim]]:
    """The nodes that average over segments which do not grow alike, with the dimensions of these segments."""
    terms = growth.terms
    return {
        average.node: set(terms.leaves(average.term))
        for average in growth.dimensions.uniform
        if not terms.grow_alike(average.term)
    }
