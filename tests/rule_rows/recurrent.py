"""Rows for the rules of `hyperclone_onnx.rules.recurrent`."""

from __future__ import annotations

from typing import Any

from hyperclone_onnx.rules.recurrent import GATES
from rule_rows.harness import Model, activation, letters, narrow, row

DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}


@row(*GATES, seeds=16)
def recurrent(m: Model, op: str) -> None:
    """In double precision, in the reference."""
    direction = m.pick(*DIRECTIONS) if op == "LSTM" else "forward"
    recurrent_row(m, op, direction, layout=m.size(0, 1) if op == "LSTM" else 0)


@row(*GATES, seeds=16)
def recurrent_in_full(m: Model, op: str) -> None:
    """Every input and attribute, in ONNX Runtime."""
    m.opset = m.pick(14, 22)
    recurrent_row(m, op, m.pick(*DIRECTIONS), layout=0, full=True)


def recurrent_row(m: Model, op: str, direction: str, layout: int, full: bool = False) -> None:
    length, batch, n, hidden = m.size(), m.size(), m.size(), m.size()
    directions, gates = DIRECTIONS[direction], GATES[op]
    state = (batch, directions, hidden) if layout else (directions, batch, hidden)
    inputs = [
        activation(m, (batch, length, n) if layout else (length, batch, n), "gpg" if layout else "pgg"),
        m.operand((directions, gates * hidden, n), "pgg", stored=m.coin(0.8)),
        m.operand((directions, gates * hidden, hidden), "pgg", stored=m.coin(0.8)),
        m.operand((directions, 2 * gates * hidden), "pg") if m.coin() else "",
        m.operand(m.rng.integers(1, length + 1, (batch,), dtype="int32"), "g") if full and m.coin() else "",
        m.operand(state) if m.coin() else "",
    ]
    if op == "LSTM":
        inputs.append(m.operand(state) if m.coin() else "")
        inputs.append(m.operand((directions, 3 * hidden), "pg") if m.coin() else "")
    attributes: dict[str, Any] = {"hidden_size": hidden} if full or m.coin() else {}
    attributes |= {"direction": direction} if direction != "forward" else {}
    attributes |= {"layout": layout} if layout else {}
    if full:
        attributes |= m.pick({}, {"clip": 0.4})
        if op == "RNN":
            attributes |= m.pick({}, {"activations": ["Relu"] * directions})
        if op == "GRU":
            attributes |= {"linear_before_reset": m.size(0, 1)}
        if op == "LSTM":
            attributes |= m.pick({}, {"activations": ["HardSigmoid", "Tanh", "Softsign"] * directions})
        narrow(m)
    want = "gppg" if layout else "ppgg"
    m.node(op, *inputs, outputs=3 if op == "LSTM" else 2, want=want, **attributes)


@row("RNN", seeds=8)
def recurrent_of_one_tensor(m: Model) -> None:
    """Inputs and state are multiplied with one stored tensor. Another node reads it too, so scalars divide the sums."""
    n = m.size()
    w = m.operand((1, n, n), "pgg", stored=True)
    m.node("RNN", activation(m, (m.size(), m.size(), n)), w, w, want="ppgg", hidden_size=n, outputs=2)
    if m.coin():
        m.node("MatMul", m.operand((m.size(), n), stored=False), w)


@row("LSTM", "GRU", seeds=6)
def recurrent_layers(m: Model, op: str) -> None:
    """Two layers, as exporters write them: the directions side by side are one axis of the second's input."""
    m.opset = 14
    length, batch, n, hidden, gates = m.size(), m.size(), m.size(), m.size(), GATES[op]
    x = activation(m, (length, batch, n), "pgg")
    for layer, width in enumerate((n, 2 * hidden)):
        shapes = ((2, gates * hidden, width), (2, gates * hidden, hidden), (2, 2 * gates * hidden))
        weights = [m.operand(shape, "p" + "g" * (len(shape) - 1), stored=True) for shape in shapes]
        outputs = m.node(
            op, x, *weights, outputs=2, inner=True, want="ppgg", hidden_size=hidden, direction="bidirectional"
        )
        moved = m.node("Transpose", outputs[0], perm=[0, 2, 1, 3], inner=True)
        x = m.node("Reshape", moved, m.ints([0, 0, -1]), inner=layer == 0, want="pgg")
    narrow(m)


RULES = ("linear", "gated", "delta", "gated_delta")


@row("LinearAttention", seeds=32)
def linear_attention(m: Model) -> None:
    """The reference computes in single precision."""
    m.opset, m.equal, m.tolerance = 27, True, 3e-5
    b, t, few, d, e = m.size(1, 3), m.size(), m.size(1, 3), m.size(), m.size()
    many = few * m.size(1, 2)
    rule = m.pick(*RULES)
    depth = "p" if "delta" in rule else "g"
    inputs = [activation(m, (b, t, n)) for n in (many * d, few * d, few * e)]
    inputs.append(m.operand((b, few, d, e), letters((b, few)) + depth + "g", stored=False) if m.coin() else "")
    inputs.append(m.operand((b, t, m.pick(few, few * d))) if "gated" in rule else "")
    inputs.append(m.operand((b, t, m.pick(few, 1))) if "delta" in rule else "")
    attributes = m.pick({}, {"scale": 0.3}, {"scale": 0.0})
    attributes |= {} if rule == "gated_delta" and m.coin() else {"update_rule": rule}
    m.node("LinearAttention", *inputs, outputs=2, q_num_heads=many, kv_num_heads=few, **attributes)


@row("CausalConvWithState", seeds=12)
def causal_conv(m: Model) -> None:
    m.opset, m.tolerance = 27, 1e-6
    b, c, t, k = m.size(), m.size(), m.size(), m.size()
    inputs = [activation(m, (b, c, t), "ggp"), m.operand((c, 1, k), "gpp")]
    inputs.append(m.operand((c,), "g") if m.coin() else "")
    inputs.append(m.operand((b, c, k - 1), "ggp", stored=False) if m.coin() else "")
    attributes = m.pick({}, {"activation": "silu"})
    m.node("CausalConvWithState", *inputs, outputs=2, want="ggp", **attributes)
