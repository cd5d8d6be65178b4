"""ONNX Runtime's own operators on parallel branches (hyper-connections): the branches keep their number."""

from __future__ import annotations

from hyperclone_onnx.algebra.dims import Term
from hyperclone_onnx.graphs import MICROSOFT
from hyperclone_onnx.rules.dimensions import Axes
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import relates

MIXED = "branches that are mixed"


def _branches(op: Op) -> tuple[Axes, Term, Term]:
    """(leading axes, branches, features) of input 0, grouped (.., C, H) or flattened (.., C * H)."""
    axes, count = op.axes(0, least=1), op.integer("num_branches", 0)
    if count < 1:
        branches, features = op.axes(0, least=2)[-2:]
        op.pin(branches, MIXED)
        return axes[:-2], branches, features
    size = op.static(axes[-1])
    if size is None or size % count:
        raise CannotTell("a number of features that is not a multiple of the number of branches")
    branches, features = op.pinned_dim(count, MIXED), op.dim(size // count)
    op.space.match([axes[-1]], [branches, features])
    return axes[:-1], branches, features


def _relate_gates(op: Op, index: int, leading: Axes, branches: Term, features: Term) -> None:
    """Relate gates of shape (.., C), (.., C, 1), (.., C, H) or (.., C * H)."""
    gates = op.axes(index)
    for one, other in zip(gates, leading, strict=False):
        op.unify(one, other)
    rest = gates[len(leading) :]
    if len(rest) == 2:
        op.unify(rest[0], branches)
        op.merge([rest[1], features])
    elif len(rest) == 1 and op.size(rest[0]) == op.size(branches):
        op.unify(rest[0], branches)
    elif len(rest) == 1:
        op.space.match([rest[0]], [branches, features])
    else:
        raise CannotTell("gates of another rank than their branches")


@relates("BranchwiseRMSNorm", domain=MICROSOFT)
def branchwise_norm(op: Op) -> None:
    """Y[.., c, h] = X[.., c, h] / sqrt(mean_h X^2 + eps) * scale[c, h]"""
    _, branches, features = _branches(op)
    op.uniform(features)
    if op.has(1):
        scale = op.axes(1, least=1)
        if len(scale) == 2:
            op.unify(scale[0], branches)
        if len(scale) == 2 or op.size(scale[0]) == op.size(features):
            op.unify(scale[-1], features)
        else:
            op.space.match([scale[0]], [branches, features])
    op.out(op.axes(0))


@relates("HyperConnectionPreMix", domain=MICROSOFT)
def pre_mix(op: Op) -> None:
    """Y[.., h] = r sum_c X[.., c, h] G[.., c, h]"""
    leading, branches, features = _branches(op)
    _relate_gates(op, 1, leading, branches, features)
    op.out((*leading, features))


@relates("HyperConnectionPostMix", domain=MICROSOFT)
def post_mix(op: Op) -> None:
    """Y[.., k, h] = sum_c M[.., c, k] X[.., c, h] + G[.., k, h] B[.., h]"""
    leading, branches, features = _branches(op)
    op.unify_axes(op.axes(1), (*leading, features))
    _relate_gates(op, 2, leading, branches, features)
    if op.has(3):
        op.unify_axes(op.axes(3), (*leading, branches, branches))
    op.out(op.axes(0))


@relates("EngramGate", domain=MICROSOFT)
def engram_gate(op: Op) -> None:
    """Y[b, s, m, h] = gate(sum_h norm K[b, s, m, h] norm Q[b, s, m, h] / sqrt(H))[b, s, m] V[b, s, h]"""
    key = op.axes(0, rank=4)
    op.unify_axes(op.axes(1), key)
    op.unify_axes(op.axes(2), (*key[:2], key[3]))
    for index in (3, 4, 5):
        if op.has(index):
            op.unify_axes(op.axes(index), key[2:])
    op.uniform(key[3])
    # n repeats make the sum n times as large, and the root of the size sqrt(n) times.
    op.sum_over((3, 1), power=0.5)
    op.out(key)
    op.out(key, index=1)


@relates("GatedAdd", domain=MICROSOFT)
def gated_add(op: Op) -> None:
    """out[.., j] = X[.., j] + Y[.., j] gate[.., 0]"""
    op.out(op.broadcast([op.axes(index) for index in range(3)]))


@relates("GatedRMSNorm", domain=MICROSOFT)
def gated_norm(op: Op) -> None:
    """Y[.., (g c)] = X / sqrt(mean_c X^2 + eps) * scale[c] * f(gate[.., (g c)])"""
    axes, features = op.axes(0, least=1), op.axis_of(1, 0)
    size, inner = op.static(axes[-1]), op.static(features)
    if size is None or not inner or size % inner:
        raise CannotTell("a number of features that is not a multiple of the length of the norm's scale")
    op.space.match([axes[-1]], [op.dim(size // inner), features])
    op.uniform(features)
    op.unify_axes(op.axes(2), axes)
    op.out(axes)
