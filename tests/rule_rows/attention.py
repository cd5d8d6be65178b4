"""Rows for the rules of `hyperclone_onnx.rules.attention`."""

from __future__ import annotations

from typing import Any

from rule_rows.harness import MICROSOFT, Model, activation, narrow, row


@row("Attention", seeds=30)
def attention(m: Model) -> None:
    m.opset, m.equal = 23, True
    b, s, t, kv, group, d, e = 2, m.size(), m.size(), m.size(1, 3), m.size(1, 2), m.size(), m.size()
    heads = kv * group
    four = m.coin()
    q = activation(m, (b, heads, s, d) if four else (b, s, heads * d))
    k = activation(m, (b, kv, t, d) if four else (b, t, kv * d))
    v = activation(m, (b, kv, t, e) if four else (b, t, kv * e))
    attributes: dict[str, Any] = {} if four else {"q_num_heads": heads, "kv_num_heads": kv}
    if m.coin():
        attributes["scale"] = 0.3
    inputs = [q, k, v]
    past = m.coin(0.3)
    total = t + (3 if past else 0)
    if m.coin():
        inputs.append(m.operand(m.pick((s, total), (b, heads, s, total), (1, 1, s, total), (b, 1, s, total))))
    if past:
        inputs += [""] * (4 - len(inputs))
        inputs += [m.operand((b, kv, 3, d), stored=False), m.operand((b, kv, 3, e), stored=False)]
    if m.coin(0.2):
        attributes["softcap"] = 2.0
    narrow(m)
    m.node("Attention", *inputs, outputs=3 if past else 1, **attributes)


@row("Attention", seeds=6)
def causal_attention(m: Model) -> None:
    m.opset, m.equal = 23, True
    s, d = m.size(), m.size()
    q, k, v = (activation(m, (2, 2, n, d), "..p." if n == s else "") for n in (s, s + 1, s + 1))
    narrow(m)
    m.node("Attention", q, k, v, is_causal=1)


@row("Attention", seeds=12)
def exactly_scaled_attention(m: Model) -> None:
    """In double precision. Most scales are not exact in float32, so growth divides the queries."""
    m.opset, m.equal, m.tolerance = 23, True, 1e-12
    b, s, t, h, d = 2, m.size(), m.size(), m.size(1, 3), m.pick(2, 3, 4, 5)
    four = m.coin()
    q, k, v = (activation(m, (b, h, n, d) if four else (b, n, h * d)) for n in (s, t, t))
    attributes: dict[str, Any] = m.pick({}, {"scale": 0.3}, {"scale": 0.25})
    attributes |= {} if four else {"q_num_heads": h, "kv_num_heads": h}
    m.node("Attention", q, k, v, want="g.gg" if four and h > 1 else "", **attributes)


@row("Attention", seeds=12)
def attention_of_a_cache(m: Model) -> None:
    """Only a part of the cache is valid, and the mask may be shorter than the cache."""
    m.opset, m.equal = m.pick(24, 25), True
    b, s, t, h, d = 2, 2, 5, m.size(1, 3), m.size()
    q, k, v = (activation(m, (b, h, n, d)) for n in (s, t, t))
    valid = m.operand(m.rng.integers(2, t, (b,)), "g")
    mask = m.operand((s, m.pick(t - 1, t)), ".p") if m.coin() else ""
    counted = m.pick({}, {"is_causal": 1}, *([{"left_window_size": 1, "right_window_size": 1}] * (m.opset == 25)))
    m.node("Attention", q, k, v, mask, "", "", valid, want=("g.pg" if counted else "g.gg") if h > 1 else "", **counted)


@row("Attention", seeds=6)
def attention_of_joined_heads(m: Model) -> None:
    """The axis of all heads is itself joined from parts, so the heads lie in segments."""
    m.opset, m.equal = 23, True
    s, d, few = m.size(), m.size(), m.size(1, 2)
    heads = [few, m.size(2, 3)]
    q, k, v = (m.node("Concat", *(activation(m, (2, s, h * d)) for h in heads), axis=2, inner=True) for _ in range(3))
    m.node("Attention", q, k, v, q_num_heads=sum(heads), kv_num_heads=sum(heads))


def rotary_row(m: Model, domain: str) -> None:
    b, s, h, half = 2, m.size(), m.size(1, 3), m.size(2, 3)
    partial = m.coin(0.3)
    d = 2 * half + (2 if partial else 0)
    four = m.coin()
    x = activation(m, (b, h, s, d) if four else (b, s, h * d))
    attributes: dict[str, Any] = {"interleaved": m.size(0, 1)} if m.coin() else {}
    if partial:
        attributes["rotary_embedding_dim"] = 2 * half
    if not four or partial:
        attributes["num_heads"] = h
    positions = m.coin() or domain != ""
    table = (32, half) if positions else (b, s, half)
    cosines, sines = m.operand(table), m.operand(table)
    narrow(m)
    ids = [m.operand(m.rng.integers(0, 7, (b, s)), stored=False)] if positions else []
    if domain and m.coin(0.3):
        ids = [m.ints([3])]
    inputs = [x, *ids, cosines, sines] if domain else [x, cosines, sines, *ids]
    m.node("RotaryEmbedding", *inputs, domain=domain, **attributes)


@row("RotaryEmbedding", seeds=16)
def rotary(m: Model) -> None:
    m.opset = 23
    rotary_row(m, "")


@row("RotaryEmbedding", domain=MICROSOFT, seeds=12)
def microsoft_rotary(m: Model) -> None:
    m.opset = 17
    rotary_row(m, MICROSOFT)
