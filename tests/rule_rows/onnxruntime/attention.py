"""Rows for the rules of `hyperclone_onnx.rules.onnxruntime.attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rule_rows.harness import MICROSOFT, Model, activation, narrow, row


def scores_bias(m: Model, b: int, h: int, s: int, t: int) -> str:
    return m.operand(m.pick((b, h, s, t), (1, 1, s, t), (b, 1, s, t), (1, h, s, t)))


def fixed(m: Model, values: Any, kind: Any = np.int32) -> str:
    """Integers that an operator reads: lengths, offsets, tables."""
    return m.operand(np.asarray(values, dtype=kind), stored=m.coin())


def place(inputs: list[str], index: int, name: str) -> None:
    """Add an optional input, with empty names before it."""
    inputs += [""] * (index - len(inputs))
    inputs.append(name)


def scaled(m: Model) -> dict[str, Any]:
    return {"scale": 0.25} if m.coin() else {}


@row("MultiHeadAttention", domain=MICROSOFT, seeds=20)
def multi_head_attention(m: Model) -> None:
    multi_head_row(m, four=False)


@row("MultiHeadAttention", domain=MICROSOFT, seeds=8)
def cross_attention(m: Model) -> None:
    multi_head_row(m, four=True)


def multi_head_row(m: Model, four: bool) -> None:
    m.opset, m.equal = 17, True
    b, s, t, h, d, e = 2, m.size(), m.size(), m.size(1, 3), m.size(), m.size()
    past = 0
    if not four and m.coin():
        past, e = 2, d
    q = activation(m, (b, s, h * d), "g.g")
    k = activation(m, (b, h, t, d) if four else (b, t, h * d))
    v = activation(m, (b, h, t, d) if four else (b, t, h * e))
    inputs = [q, k, v]
    if not four and m.coin():
        inputs.append(m.operand((2 * h * d + h * e,)))
    if m.coin(0.3):
        mask = m.pick((b, t + past), (b, s, t + past))
        place(inputs, 4, fixed(m, m.rng.integers(0, 2, mask)))
    if m.coin():
        place(inputs, 5, scores_bias(m, b, h, s, t + past))
    if past:
        place(inputs, 6, m.operand((b, h, past, d), "g.pg", stored=False))
        place(inputs, 7, m.operand((b, h, past, e), "g.pg", stored=False))
    narrow(m)
    m.node(
        "MultiHeadAttention", *inputs, outputs=m.pick(3, 4) if past else 1, domain=MICROSOFT, num_heads=h, **scaled(m)
    )


@row("MultiHeadAttention", domain=MICROSOFT, seeds=6)
def causal_multi_head_attention(m: Model) -> None:
    m.opset, m.equal = 17, True
    s, h, d = m.size(), m.size(1, 3), m.size()
    inputs = [activation(m, (2, s, h * d), "gpg") for _ in range(3)]
    narrow(m)
    m.node("MultiHeadAttention", *inputs, domain=MICROSOFT, num_heads=h, unidirectional=1)


@row("MultiHeadAttention", domain=MICROSOFT, seeds=8)
def multi_head_attention_of_a_buffer(m: Model) -> None:
    m.equal, m.tolerance = True, 2e-6
    b, s, h, d, past, capacity = 2, m.size(1, 2), m.size(2, 3), m.size(), 2, 5
    beams = m.coin()
    inputs = [activation(m, (b, s, h * d), ("p" if beams else "g") + "." + "g") for _ in range(3)]
    if m.coin():
        place(inputs, 5, scores_bias(m, b, h, s, past + s))
    for index in (6, 7):
        place(inputs, index, m.operand((b, h, capacity, d), ".gpg", stored=False))
    place(inputs, 8, fixed(m, [past]))
    if beams:
        place(inputs, 9, fixed(m, np.zeros((b, 1, capacity))))
    m.node("MultiHeadAttention", *inputs, outputs=3, domain=MICROSOFT, num_heads=h, **scaled(m))


@row("MultiHeadAttention", domain=MICROSOFT, seeds=12)
def packed_operands(m: Model) -> None:
    m.equal, m.tolerance = True, 2e-6
    b, s, t, h, d = 2, m.size(), m.size(), m.size(2, 3), m.size()
    if m.coin():
        inputs, t = [activation(m, (b, s, h, 3, d), "gpgpg")], s
    else:
        inputs = [activation(m, (b, s, h * d), "ggg"), activation(m, (b, t, h, 2, d), "gpgpg")]
    if m.coin():
        place(inputs, 5, scores_bias(m, b, h, s, t))
    m.node("MultiHeadAttention", *inputs, domain=MICROSOFT, num_heads=h, **scaled(m))


def sequences(m: Model, count: int = 2) -> tuple[list[int], list[int]]:
    """The lengths of sequences, and their starts followed by the end of the last."""
    lengths = [m.size(1, 3) for _ in range(count)]
    return lengths, [0, *np.cumsum(lengths).tolist()]


def offsets(lengths: Sequence[int]) -> Any:
    longest = max(lengths)
    real = [b * longest + i for b, length in enumerate(lengths) for i in range(length)]
    rest = [i for i in range(len(lengths) * longest) if i not in real]
    return np.asarray(real + rest, np.int32).reshape(len(lengths), longest)


@row("PackedMultiHeadAttention", domain=MICROSOFT, seeds=12)
def packed_multi_head_attention(m: Model) -> None:
    m.equal, m.tolerance = True, 2e-6
    h, d, e = m.size(2, 3), m.size(), m.size()
    lengths, ends = sequences(m)
    n = ends[-1]
    if m.coin(0.3):
        inputs, e = [activation(m, (n, h, 3, d), "pgpg"), "", ""], d
    else:
        inputs = [activation(m, (n, h * width), "pg") for width in (d, d, e)]
    inputs.append(m.operand((h * (2 * d + e),), "g") if m.coin() else "")
    inputs += [fixed(m, offsets(lengths)), fixed(m, ends)]
    if m.coin():
        inputs.append(m.operand(m.pick((1, h), (1, 1), (2, h)) + (max(lengths),) * 2))
    m.node("PackedMultiHeadAttention", *inputs, domain=MICROSOFT, num_heads=h, want="pg", **scaled(m))


@row("DecoderMaskedMultiHeadAttention", domain=MICROSOFT, seeds=16)
def decoder_masked_multi_head_attention(m: Model) -> None:
    """Keys in the order of the source. On the CPU there is only the shared buffer."""
    m.equal, m.tolerance = True, 2e-6
    b, h, d, past = 2, m.size(1, 3), m.size(), m.size()
    crossed = m.coin(0.3)
    if crossed:
        inputs = [activation(m, (b, 1, h * d)), *(activation(m, (b, h, past, d)) for _ in range(2))]
        total = past
    else:
        inputs = [activation(m, (b, 1, h * d), "gpg") for _ in range(3)]
        total = past + 1
    if m.coin():
        place(inputs, 3, fixed(m, np.ones((b, total))))
    if m.coin():
        place(inputs, 4, m.operand((1, m.pick(1, h), 1, total)))
    if not crossed:
        for index in (5, 6):
            place(inputs, index, m.operand((b, h, past, d), stored=False))
    if m.coin() and not crossed:
        place(inputs, 10, m.operand((3 * h * d,)))
    outputs = 1 if crossed else 3
    m.node("DecoderMaskedMultiHeadAttention", *inputs, outputs=outputs, domain=MICROSOFT, num_heads=h, **scaled(m))


@row("DecoderMaskedMultiHeadAttention", domain=MICROSOFT, seeds=8)
def decoder_masked_multi_head_attention_of_a_buffer(m: Model) -> None:
    m.opset, m.equal = 17, True
    b, h, d, past, capacity = 2, m.size(2, 3), m.size(), 2, 4
    inputs = [activation(m, (b, 1, h * d), "gpg") for _ in range(3)]
    inputs += ["", m.operand((1, m.pick(1, h), 1, past + 1)) if m.coin() else ""]
    inputs += [m.operand(np.zeros((b, h, capacity, d)), "ggpp", stored=False) for _ in range(2)]
    inputs.append(fixed(m, [past]))
    narrow(m)
    attributes = {"num_heads": h, "past_present_share_buffer": 1, **scaled(m)}
    m.node("DecoderMaskedMultiHeadAttention", *inputs, outputs=3, domain=MICROSOFT, **attributes)
