"""Rows for the rules of `hyperclone_onnx.rules.onnxruntime.projected_attention`."""

from __future__ import annotations

from typing import Any

import numpy as np

from rule_rows.harness import MICROSOFT, Model, activation, narrow, row
from rule_rows.onnxruntime.attention import fixed, offsets, place, scaled, scores_bias, sequences


@row("Attention", domain=MICROSOFT, seeds=16)
def projected_attention(m: Model) -> None:
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
    past = 0 if named else m.pick(0, 2)
    mask = m.pick(None, (b, s + past), (b, s, s + past), (b,))
    if mask is not None:
        place(inputs, 3, fixed(m, np.full(mask, s) if len(mask) == 1 else m.rng.integers(0, 2, mask)))
    if past:
        place(inputs, 4, m.operand((2, b, h, past, d), "p..pg", stored=False))
    elif m.coin():  # the CPU has no bias beside a cache
        place(inputs, 5, scores_bias(m, b, h, s, s))
    narrow(m)
    attributes: dict[str, Any] = {"qkv_hidden_sizes": [h * d, h * d, h * e]} if named else {}
    attributes["unidirectional"] = m.size(0, 1)
    outputs = 2 if past else 1
    m.node("Attention", *inputs, outputs=outputs, domain=MICROSOFT, num_heads=h, **attributes, **scaled(m))


@row("PackedAttention", domain=MICROSOFT, seeds=12)
def packed_attention(m: Model) -> None:
    m.equal, m.tolerance = True, 2e-6
    n, h, d, e = m.size(), m.size(2, 3), m.size(), m.size()
    named = m.coin()
    e = e if named else d
    lengths, ends = sequences(m)
    width = h * (2 * d + e)
    inputs = [activation(m, (ends[-1], n), "pg"), m.operand((n, width), "gg"), m.operand((width,), "g")]
    inputs += [fixed(m, offsets(lengths)), fixed(m, ends)]
    if m.coin():
        inputs.append(m.operand(m.pick((1, h), (1, 1), (2, h)) + (max(lengths),) * 2))
    attributes: dict[str, Any] = {"qkv_hidden_sizes": [h * d, h * d, h * e]} if named else {}
    m.node("PackedAttention", *inputs, domain=MICROSOFT, num_heads=h, want="pg", **attributes, **scaled(m))


@row("DecoderMaskedSelfAttention", domain=MICROSOFT, seeds=12)
def decoder_masked_self_attention(m: Model) -> None:
    m.equal, m.tolerance = True, 2e-6
    b, n, h, d, past = 2, m.size(), m.size(2, 3), m.size(), m.size()
    inputs = [activation(m, (b, 1, n), "gpg"), m.operand((n, 3 * h * d), "gg"), m.operand((3 * h * d,), "g")]
    inputs.append(fixed(m, m.rng.integers(0, 2, (b, past + 1))) if m.coin() else "")
    inputs.append(m.operand((2, b, h, past, d), "pggpg", stored=False))
    inputs.append(m.operand((1, m.pick(1, h), 1, past + 1)) if m.coin() else "")
    inputs.append(fixed(m, [past]))
    m.node("DecoderMaskedSelfAttention", *inputs, outputs=2, domain=MICROSOFT, num_heads=h, **scaled(m))


@row("LongformerAttention", domain=MICROSOFT, seeds=12)
def longformer_attention(m: Model) -> None:
    b, s, h, d, window = 2, 8, m.size(2, 3), m.size(), 2
    x = activation(m, (b, s, h * d), "gpg")
    inputs = [x, m.operand((h * d, 3 * h * d), "gg"), m.operand((3 * h * d,), "g"), m.operand((b, s), "gp")]
    inputs += [m.operand((h * d, 3 * h * d), "gg"), m.operand((3 * h * d,), "g")]
    flags = np.zeros((b, s), np.int32)
    flags[:, 0] = 1
    inputs.append(m.operand(flags, "gp"))
    m.node("LongformerAttention", *inputs, domain=MICROSOFT, num_heads=h, window=window, want="gpg")


@row("DecoderAttention", domain=MICROSOFT, seeds=12)
def decoder_attention(m: Model) -> None:
    b, s, h, d, past = 2, m.size(), m.size(2, 3), m.size(), m.size()
    n = h * d
    x = activation(m, (s, b, n), "pgg")
    y = x if m.coin() else activation(m, (m.size(), b, n), "pgg")
    inputs = [x, y, m.operand((n, n), "gg"), m.operand((n, 2 * n), "gg"), m.operand((3 * n,), "g"), ""]
    inputs += [m.operand((b, h, past, d), "ggpp", stored=False) for _ in range(2)]
    inputs += [fixed(m, [flag], np.bool_) for flag in (False, m.coin(), True, False)]
    m.node("DecoderAttention", *inputs, outputs=3, domain=MICROSOFT, num_heads=h, want="pgg")
