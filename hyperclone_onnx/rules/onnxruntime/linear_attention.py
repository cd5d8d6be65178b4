"""ONNX Runtime's own recurrences over a sequence: linear attention, causal convolution, and their gates."""

from __future__ import annotations

from hyperclone_onnx.algebra.dims import ONE, Concat, Product, Term
from hyperclone_onnx.graphs import MICROSOFT
from hyperclone_onnx.rules.attention import edit_heads, edit_scale, head_terms, relate_heads, split_heads
from hyperclone_onnx.rules.dimensions import Axes, Fact, Uniform
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.recurrent import relate_gate
from hyperclone_onnx.rules.registry import edits, relates

RECURRENT = "a recurrence steps along it"
OWN_STATE = "a delta rule sums over it, and keeps the sum in its state"


def _relate_state(op: Op, depth: Term, value_depth: Term, many: Term, few: Term) -> None:
    """Relate the axes of S = sum_t k_t v_t and o = scale sum_d q[d] S[d, e].

    A delta rule also sums over d when it updates S, and no scale undoes that.
    """
    relate_heads(op, many, few)
    op.fact(Fact.CONTRACTED_WITH_ACTIVATION, depth)
    op.fact(Fact.VALUE_AXIS, value_depth)
    op.dimensions.uniform.append(Uniform(op.node, depth))
    if op.text("update_rule", "gated_delta") in ("delta", "gated_delta"):
        op.pin(depth, OWN_STATE)


def _windowed(op: Op, name: str, state: Axes) -> Axes:
    """The axes of the state, or of one state for each position of a window."""
    window = op.integer(name, 0)
    return (op.pinned_dim(window, "positions of a window"), *state) if window else state


def _unify_all(op: Op, index: int, wanted: Axes) -> None:
    if op.has(index):
        op.unify_axes(op.axes(index), wanted)


@relates("LinearAttention", domain=MICROSOFT)
def linear_attention(op: Op) -> None:
    """o_t[h, e] = scale sum_d q_t[h, d] S_t[h, d, e], with S_t = decay S_{t-1} + k_t v_t, or that of a delta rule"""
    query, key, value = (op.axes(index, rank=3) for index in range(3))
    batch, length = query[:2]
    heads, depth = split_heads(op, query[2], op.integer("q_num_heads"))
    kv_heads, key_depth = split_heads(op, key[2], op.integer("kv_num_heads"))
    value_heads, value_depth = split_heads(op, value[2], op.integer("kv_num_heads"))
    op.unify(key_depth, depth)
    op.unify(value_heads, kv_heads)
    inverse = op.integer("kv_num_heads") > op.integer("q_num_heads")
    many, few = (kv_heads, heads) if inverse else (heads, kv_heads)
    _relate_state(op, depth, value_depth, many, few)
    op.pin(length, RECURRENT)
    for axes in (key, value):
        op.unify_axes(axes[:2], (batch, length))
    for index in (4, 5):
        if op.has(index):
            axes = op.axes(index, rank=3)
            op.unify_axes(axes[:2], (batch, length))
            relate_gate(op, axes[2], (kv_heads, Product((kv_heads, depth))) if index == 4 else (kv_heads, ONE))
    state = _windowed(op, "state_window", (batch, kv_heads, depth, value_depth))
    _unify_all(op, 3, state)
    op.out((batch, length, Product((many, value_depth))))
    op.out(state, index=1)


@edits("LinearAttention", domain=MICROSOFT)
def edit_linear_attention(op: GrownOp) -> None:
    """Sets the numbers of heads and the scale of the output."""
    heads, depth = head_terms(op, op.axis_of(0, 2), op.integer("q_num_heads"))
    edit_heads(op, "q_num_heads", heads)
    edit_heads(op, "kv_num_heads", head_terms(op, op.axis_of(1, 2), op.integer("kv_num_heads"))[0])
    edit_scale(op, depth)


@relates("GatedDeltaNet", domain=MICROSOFT)
def gated_delta_net(op: Op) -> None:
    """LinearAttention with separate axes for tokens and heads: o[n, v, e] = scale sum_d q[n, h, d] S[v, e, d]"""
    if op.integer("state_update_capacity", 0):
        raise CannotTell("transitions of several kinds in one row")
    query = op.axes(0, least=2)
    if op.has(1):
        query = op.axes(0, least=3)
        tokens, (heads, depth), (many, value_depth) = query[:-2], query[-2:], op.axes(2, least=2)[-2:]
        _unify_all(op, 1, (*tokens, heads, depth))
        _unify_all(op, 2, (*tokens, many, value_depth))
    else:
        tokens, (many, value_depth, depth) = query[:-1], op.axes(6, rank=4)[1:]
        heads = _packed_heads(op, many, value_depth, depth)
    _relate_state(op, depth, value_depth, many, heads)
    if op.integer("qk_l2_norm", 0):
        op.pin(depth, "the operator normalises its keys over it, and keeps them in a state")
    op.pin(tokens[-1], RECURRENT)
    if len(tokens) == 1 and op.has(3):
        op.parameter(3)
    for index in (4, 5):
        wanted = (*tokens, many, depth) if op.has(index) and op.rank(index) == len(tokens) + 2 else (*tokens, many)
        _unify_all(op, index, wanted)
    for index in (7, 8):
        _unify_all(op, index, (many,))
    batch = _batch(op, tokens)
    state = (batch, many, value_depth, depth)
    _unify_all(op, 6, state)
    op.out((*tokens, many, value_depth))
    op.out(state, index=1)


def _packed_heads(op: Op, many: Term, value_depth: Term, depth: Term) -> Term:
    """The query heads of an axis that holds queries, keys and values. The other sizes are those of the state."""
    width, values, size = op.static(op.axis_of(0, -1)), op.static(Product((many, value_depth))), op.static(depth)
    if width is None or values is None or not size or width <= values or (width - values) % (2 * size):
        raise CannotTell("packed queries, keys and values of unknown widths")
    heads = op.dim((width - values) // (2 * size))
    keys = Product((heads, depth))
    op.unify(op.axis_of(0, -1), Concat((keys, keys, Product((many, value_depth)))))
    return heads


def _batch(op: Op, tokens: Axes) -> Term:
    """The axis of sequences: the first axis of the tokens, or the first of the state."""
    if len(tokens) == 2:
        return tokens[0]
    batch = op.axis_of(6, 0) if op.has(6) else op.dim(None)
    op.pin(batch, "sequences of tokens")
    return batch


@edits("GatedDeltaNet", domain=MICROSOFT)
def edit_gated_delta_net(op: GrownOp) -> None:
    """Sets the scale of the output."""
    edit_scale(op, op.axis_of(0, -1) if op.has(1) else op.axis_of(6, 3))


@relates("LinearAttentionGate", domain=MICROSOFT)
def linear_attention_gate(op: Op) -> None:
    """decay[b, t, h] = c[h] softplus(a[b, t, h] + bias[h]), beta[b, t, h] = sigmoid(b[b, t, h])"""
    axes = op.broadcast([op.axes(index) for index in (0, 1, 2, 3) if op.has(index)])
    op.out(axes)
    op.out(axes, index=1)


@relates("CausalConvWithState", domain=MICROSOFT)
def causal_convolution(op: Op) -> None:
    """Y[b, c, t] = f(sum_k W[c, 0, k] X[b, c, t + k - K + 1] + B[c]); the state is the last K - 1 of X"""
    x, w = op.axes(0, least=3), op.axes(1, rank=3)
    if op.integer("ndim", 1) != 1:
        raise CannotTell("a causal convolution over more than one axis")
    for term in w[1:]:
        op.pin(term, "a convolution's kernel")
    kernel = op.static(w[2])
    length = op.pinned_dim(
        None if kernel is None else (kernel - 1) * op.integer("dilation", 1), "positions of a convolution's state"
    )
    if op.integer("channels_last", 0):
        positions = x[1]
        channels: Term = Product(x[2:])
        op.space.match([w[0]], x[2:])
        state: Axes = (x[0], length, *x[2:])
    else:
        positions, channels = x[2], x[1]
        op.unify(w[0], channels)
        state = (x[0], channels, length)
    op.pin(positions, RECURRENT)
    if op.has(2):
        op.unify(op.axis_of(2, 0), channels)
    state = _windowed(op, "state_window", state)
    _unify_all(op, 3, state)
    op.out(x)
    op.out(state, index=1)


@relates("VarlenCausalConvWithState", domain=MICROSOFT)
def packed_causal_convolution(op: Op) -> None:
    """CausalConvWithState of tokens of several sequences: Y[n, c] reads the tokens of its own sequence"""
    (tokens, channels), w, state = op.axes(0, rank=2), op.axes(1, least=1), op.axes(4, rank=3)
    for term in (tokens, *w[1:], state[0], state[2]):
        op.pin(term, "positions of a convolution")
    for term in (w[0], state[1], *(op.axes(3) if op.has(3) else ())):
        op.unify(term, channels)
    for index in (2, 5):
        op.parameter(index)
    op.out((tokens, channels))
    op.out(state, index=1)
    slots = op.pinned_dim(op.integer("state_update_capacity", 0), "positions of an update")
    op.out((state[0], slots, channels), index=2)
