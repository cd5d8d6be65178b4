"""Rows for the rules of `hyperclone_onnx.rules.microsoft_attention`."""

from __future__ import annotations

from typing import Any

import numpy as np

from rule_rows.harness import MICROSOFT, Model, activation, narrow, row


@row("MultiHeadAttention", domain=MICROSOFT, seeds=20)
def multi_head_attention(m: Model) -> None:
    multi_head_row(m, four=False)


@row("MultiHeadAttention", domain=MICROSOFT, seeds=8)
def cross_attention(m: Model) -> None:
    multi_head_row(m, four=True)


def multi_head_row(m: Model, four: bool) -> None:
    m.opset, m.equal = 17, True
    b, s, t, h, d, e = 2, m.size(), m.size(), m.size(1, 3), m.size(), m.size()
    q = activation(m, (b, s, h * d))
    k = activation(m, (b, h, t, d) if four else (b, t, h * d))
    v = activation(m, (b, h, t, d) if four else (b, t, h * e))
    inputs = [q, k, v]
    if not four and m.coin():
        inputs.append(m.operand((2 * h * d + h * e,)))
    if m.coin():
        inputs += [""] * (5 - len(inputs))
        inputs.append(m.operand(m.pick((b, h, s, t), (1, 1, s, t), (b, 1, s, t), (1, h, s, t))))
    narrow(m)
    attributes = {"scale": 0.3} if m.coin() else {}
    m.node("MultiHeadAttention", *inputs, domain=MICROSOFT, num_heads=h, **attributes)


@row("GroupQueryAttention", domain=MICROSOFT, seeds=16)
def group_query_attention(m: Model) -> None:
    group_query_row(m, 1, 1)


@row("GroupQueryAttention", domain=MICROSOFT, seeds=6)
def group_query_attention_of_a_batch(m: Model) -> None:
    group_query_row(m, 2, 1)


@row("GroupQueryAttention", domain=MICROSOFT, seeds=6)
def group_query_attention_of_a_prompt(m: Model) -> None:
    group_query_row(m, 1, 3)


def group_query_row(m: Model, b: int, s: int) -> None:
    m.opset, m.equal = 17, True
    kv, group, d = m.size(1, 3), m.size(1, 2), 16
    heads, past = kv * group, 2
    packed = m.coin(0.3)
    if packed:
        inputs = [activation(m, (b, s, (heads + 2 * kv) * d)), "", ""]
    else:
        inputs = [activation(m, (b, s, n * d)) for n in (heads, kv, kv)]
    inputs += [m.operand((b, kv, past, d), stored=False) for _ in range(2)]
    total = s + past
    inputs += [
        m.operand(np.full((b,), total - 1, np.int32), stored=True),
        m.operand(np.asarray(total, np.int32), stored=True),
    ]
    attributes: dict[str, Any] = {}
    if m.coin():
        attributes["do_rotary"] = 1
        inputs += [m.operand((16, d // 2)), m.operand((16, d // 2))]
    narrow(m)
    m.node(
        "GroupQueryAttention",
        *inputs,
        outputs=3,
        domain=MICROSOFT,
        num_heads=heads,
        kv_num_heads=kv,
        **attributes,
    )


@row("Attention", domain=MICROSOFT, seeds=12)
def packed_attention(m: Model) -> None:
    m.opset, m.equal = 17, True
    b, s, n, h, d, e = 2, m.size(), m.size(), m.size(1, 3), m.size(), m.size()
    named = m.coin()
    if not named:
        e = d
    inputs = [
        activation(m, (b, s, n), "..g"),
        m.operand((n, h * (2 * d + e)), "gg"),
        m.operand((h * (2 * d + e),), "g"),
    ]
    narrow(m)
    attributes: dict[str, Any] = {"qkv_hidden_sizes": [h * d, h * d, h * e]} if named else {}
    m.node("Attention", *inputs, domain=MICROSOFT, num_heads=h, **attributes)
