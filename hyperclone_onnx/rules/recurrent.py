"""Layers that carry a state from step to step. The sequence keeps its length, since its steps follow each other."""

from __future__ import annotations

from collections.abc import Sequence

from hyperclone_onnx.algebra.dims import ONE, Concat, Product, Term
from hyperclone_onnx.rules.attention import divide_scores, edit_heads, head_terms, relate_heads, split_heads
from hyperclone_onnx.rules.dimensions import Axes, Fact, Uniform
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, relates

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
PEEPHOLES = 3


def _unify_all(op: Op, index: int, wanted: Axes) -> None:
    """Relate the axes of an optional input."""
    if not op.has(index):
        return
    op.unify_axes(op.axes(index), wanted)


# -- RNN, GRU, LSTM ---------------------------------------------------------------------------------------


@relates(*GATES)
def recurrent(op: Op) -> None:
    """H[t, h] = f(sum_i X[t, i] W[(gate h), i], sum_k H[t-1, k] R[(gate h), k], B, H[t-1, h]), f elementwise"""
    directions, _, hidden = op.axes(2, rank=3)
    if op.static(hidden) is None:
        raise CannotTell("a state of unknown width")
    gates = GATES[op.node.op_type]
    relate_states(op, directions, hidden, gates, batch_first=bool(op.integer("layout", 0)))
    op.sum_over((0, 2), (1, 2))
    op.sum_over((2, 2))
    every_gate = Concat((hidden,) * gates)
    _unify_all(op, 1, (directions, every_gate, op.axis_of(0, 2)))
    _unify_all(op, 2, (directions, every_gate, hidden))


def relate_states(op: Op, directions: Term, hidden: Term, gates: int, batch_first: bool) -> None:
    """Relate all axes except those of the weights. RNN, GRU and LSTM have the same inputs and outputs here."""
    x = op.axes(0, rank=3)
    length, batch = (x[1], x[0]) if batch_first else (x[0], x[1])
    op.pin(length, "a recurrence steps along it")
    op.pin(directions, "the directions of a recurrence")
    op.fact(Fact.CONTRACTED_WITH_WEIGHT, hidden)
    op.fact(Fact.WEIGHT_OUTPUT, hidden)
    op.fact(Fact.STATE, hidden)

    every_gate = Concat((hidden,) * gates)
    state = (batch, directions, hidden) if batch_first else (directions, batch, hidden)
    _unify_all(op, 3, (directions, Concat((every_gate, every_gate))))
    _unify_all(op, 4, (batch,))
    _unify_all(op, 5, state)
    _unify_all(op, 6, state)
    _unify_all(op, 7, (directions, Concat((hidden,) * PEEPHOLES)))
    op.out((batch, length, directions, hidden) if batch_first else (length, directions, batch, hidden))
    for index in range(1, len(op.node.outputs)):
        op.out(state, index=index)


@edits(*GATES)
def edit_recurrent(op: GrownOp) -> None:
    """Sets the width of the state."""
    edit_state(op, op.axis_of(2, 2))


def edit_state(op: GrownOp, hidden: Term) -> None:
    """Set the attribute that holds the width of the state, if the node has it."""
    if op.has_attribute("hidden_size"):
        op.set_attribute("hidden_size", op.grown(hidden))


# -- linear attention -------------------------------------------------------------------------------------


def relate_gate(op: Op, term: Term, choices: Sequence[Term]) -> None:
    """Relate the last axis of a gate with the choice of the same size. Without such a choice, pin all of them."""
    for choice in choices:
        if op.size(term) == op.size(choice):
            op.unify(term, choice)
            return
    for axis in (term, *choices):
        op.pin(axis, "the last axis of a gate is not known to number heads or channels")


@relates("LinearAttention")
def linear_attention(op: Op) -> None:
    """Y[t, (h e)] = scale sum_d Q[t, (h d)] S[t, h', d, e], S[t] = decay S[t-1] + K[t, (h' d)] (x) V[t, (h' e)]"""
    batch, length, width = op.axes(0, rank=3)
    many, few = op.integer("q_num_heads"), op.integer("kv_num_heads")
    heads, depth = split_heads(op, width, many)
    kv_heads, key_depth = split_heads(op, op.axes(1, rank=3)[2], few)
    value_heads, value_depth = split_heads(op, op.axes(2, rank=3)[2], few)
    op.unify(key_depth, depth)
    op.unify(value_heads, kv_heads)
    relate_heads(op, heads, kv_heads)
    op.pin(length, "a recurrence steps along it")
    for index in (1, 2):
        op.unify_axes(op.axes(index)[:2], (batch, length))

    state = (batch, kv_heads, depth, value_depth)
    _unify_all(op, 3, state)
    for index, choices in ((4, (kv_heads, Product((kv_heads, depth)))), (5, (kv_heads, ONE))):
        if op.has(index):
            last = op.axis_of(index, 2)
            _unify_all(op, index, (batch, length, last))
            relate_gate(op, last, choices)
    op.fact(Fact.CONTRACTED_WITH_ACTIVATION, depth)
    op.fact(Fact.VALUE_AXIS, value_depth)
    op.dimensions.uniform.append(Uniform(op.node, depth))
    if op.text("update_rule", "gated_delta") in ("delta", "gated_delta"):
        op.pin(depth, "a delta rule sums over it, and keeps the sum in its state")
    op.out((batch, length, Product((heads, value_depth))))
    op.out(state, index=1)


@edits("LinearAttention")
def edit_linear_attention(op: GrownOp) -> None:
    """Sets the numbers of heads and the scale of the output. An attribute `scale` of 0 means the default."""
    heads, depth = head_terms(op, op.axis_of(0, 2), op.integer("q_num_heads"))
    edit_heads(op, "q_num_heads", heads)
    edit_heads(op, "kv_num_heads", head_terms(op, op.axis_of(1, 2), op.integer("kv_num_heads"))[0])
    divide_scores(op, depth, op.number("scale") or None)


@relates("CausalConvWithState")
def causal_conv(op: Op) -> None:
    """Y[b, c, t] = f(sum_k X[b, c, t - k] W[c, 1, k] + B[c]), past steps are read from the state"""
    batch, channels, length = op.axes(0, rank=3)
    kernel = op.axis_of(1, 2)
    op.pin(length, "a convolution's kernel moves along it")
    op.pin(kernel, "a convolution's kernel")
    op.unify(op.axis_of(1, 0), channels)
    _unify_all(op, 2, (channels,))
    past: Term = op.axis_of(3, 2) if op.has(3) else op.dim(None if (k := op.static(kernel)) is None else k - 1)
    op.pin(past, "the steps that a state holds")
    _unify_all(op, 3, (batch, channels, past))
    op.out((batch, channels, length))
    op.out((batch, channels, past), index=1)
