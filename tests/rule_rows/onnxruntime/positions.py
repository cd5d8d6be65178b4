"""Rows for the rules of `hyperclone_onnx.rules.onnxruntime.positions`."""

from __future__ import annotations

from typing import Any

import numpy as np

from rule_rows.harness import MICROSOFT, Model, activation, narrow, row


@row("GemmaRotaryEmbedding", domain=MICROSOFT, seeds=6)
def gemma_rotary(m: Model) -> None:
    b, h, s, d = (m.size() for _ in range(4))
    inputs = [m.operand((b, s, d), "ggg"), *(activation(m, (b, h, s, d), "gggg") for _ in range(4))]
    m.node("GemmaRotaryEmbedding", *inputs, outputs=2, domain=MICROSOFT)


@row("MRotaryEmbedding", domain=MICROSOFT, seeds=20)
def sectioned_rotary(m: Model) -> None:
    m.opset = 17
    b, h, s, half = 2, m.size(2, 3), m.size(), m.size(3, 6)
    partial, four, layout = m.coin(0.3), m.coin(), m.size(0, 1)
    d = 2 * half + (2 if partial else 0)
    attributes: dict[str, Any] = {"interleaved": m.size(0, 1), "mrope_layout": layout}
    if partial:
        attributes["rotary_embedding_dim"] = 2 * half
    if not four or partial:
        attributes["num_heads"] = h
    cut = sorted(m.rng.integers(0, half + 1, 2).tolist())
    sections = [cut[0], cut[1] - cut[0], half - cut[1]]
    if layout:  # height and width take every third place
        sections = [half - 2 * (half // 3), half // 3, half // 3]
    want = "p" if layout else "g"
    inputs = [activation(m, (b, h, s, d) if four else (b, s, h * d), "ggg." if four else "ggg")]
    inputs.append(m.operand(m.rng.integers(0, 9, (3, b, s)), "pgg", stored=False))
    inputs += [m.operand((64, half), "p" + want) for _ in range(2)]
    narrow(m)
    m.node("MRotaryEmbedding", *inputs, domain=MICROSOFT, mrope_section=sections, **attributes)


@row("RelativePositionBias", domain=MICROSOFT, seeds=2)
def relative_position_bias(m: Model) -> None:
    length = m.operand(np.array([5]), stored=True)
    inputs = [m.operand((8, 3), "pp"), length, length]
    m.node("RelativePositionBias", *inputs, domain=MICROSOFT, max_distance=16, want="pppp")


@row("GatedRelativePositionBias", domain=MICROSOFT, seeds=10)
def gated_relative_position_bias(m: Model) -> None:
    b, s, h, d = m.size(), m.size(), m.size(2, 3), m.size()
    inputs = [activation(m, (b, s, h * d), "gpg"), m.operand((h * d,), "g"), m.operand((1, h, s, s), ".gpp")]
    inputs += [m.operand((d, 4), "gp"), m.operand((4,), "p"), m.operand((1, h, 1, 1), ".g..")]
    m.node("GatedRelativePositionBias", *inputs, domain=MICROSOFT, num_heads=h, want="ggpp")
