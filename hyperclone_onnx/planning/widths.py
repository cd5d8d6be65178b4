"""Any width under norms: which construction each averaged dimension gets, and what follows for the whole graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Concat, Dim, Term
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.graphs import describe
from hyperclone_onnx.planning.averaging import Averaging, averaged
from hyperclone_onnx.planning.request import Growth
from hyperclone_onnx.planning.stretching import Stretches, Stretching
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
    _check_segments(growth)
    uneven = _uneven(growth)
    means = averaged(uneven)
    kinds: list[tuple[type[Stretching], set[Dim]]] = [(Averaging, means), (Stretching, {a for _, a in uneven} - means)]
    sums, total = (list(carried), list(divided)), Stretches()
    for kind, dims in kinds:
        if dims:
            stretching = kind(growth, dims, *sums)
            stretching.check()
            for uses in tied:
                stretching.tie(uses)
            stretching.relate()
            total = total.joined(stretching.solved())
    return total


def _uneven(growth: Growth) -> dict[tuple[ir.Node, Dim], None]:
    """The dimensions that a node averages over, and whose indices are repeated unequally, with the node."""
    uneven: dict[tuple[ir.Node, Dim], None] = {}
    for average in growth.dimensions.uniform:
        for atom in growth.terms.leaves(average.term):
            if not growth.maps[atom][1].is_even:
                uneven[average.node, atom] = None
    return uneven


def _check_segments(growth: Growth) -> None:
    """Check that the segments of an averaged axis grow alike: an average over two of them weighs them by their lengths.

    Raises:
        Refused: they do not.
    """
    terms = growth.terms

    def grows_alike(term: Term) -> bool:
        resolved = terms.space.resolve(term)
        if isinstance(resolved, Dim):
            return True
        parts = resolved.segments if isinstance(resolved, Concat) else resolved.factors
        alike = not isinstance(resolved, Concat) or len({terms.growth(part) for part in parts}) == 1
        return alike and all(map(grows_alike, parts))

    for average in growth.dimensions.uniform:
        if not grows_alike(average.term):
            raise Refused(
                f"{describe(average.node)} averages over an axis whose parts would not grow equally "
                f"({terms.written(average.term)}): give its parts one factor with --set"
            )
