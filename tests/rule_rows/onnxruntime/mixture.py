"""Rows for the rule of `hyperclone_onnx.rules.onnxruntime.mixture`."""

from __future__ import annotations

from typing import Any

from rule_rows.harness import MICROSOFT, Model, activation, narrow, row


def experts_row(m: Model, kind: str, fusion: int, gated: bool) -> None:
    n, hidden, inter, experts = m.size(2, 3), m.size(), m.size(), 4
    three = m.coin()
    tokens: tuple[int, ...] = (m.size(), n) if three else (n,)
    x = activation(m, (*tokens, hidden), "g" * len(tokens) + "g")
    rows = inter * (2 if fusion else 1)
    count = tokens[0] * (tokens[1] if three else 1)
    inputs = [x, activation(m, (count, experts), "gp"), m.operand((experts, rows, hidden), "pgg")]
    inputs.append(m.operand((experts, rows), "pg") if m.coin() else "")
    inputs.append(m.operand((experts, hidden, inter), "pgg"))
    inputs.append(m.operand((experts, hidden), "pg") if m.coin() else "")
    if gated:
        inputs.append(m.operand((experts, inter, hidden), "pgg"))
        inputs += [m.operand((experts, inter), "pg")] if m.coin() else []
    attributes: dict[str, Any] = {"k": m.size(1, 2), "normalize_routing_weights": 1, "activation_type": kind}
    if kind == "swiglu":
        attributes |= {"swiglu_fusion": fusion, "activation_alpha": 1.5, "activation_beta": 1.0}
    m.node("MoE", *inputs, domain=MICROSOFT, want="g" * len(tokens) + "g", **attributes)


@row("MoE", domain=MICROSOFT, seeds=16)
def experts(m: Model) -> None:
    m.opset = 17
    experts_row(m, *m.pick(("relu", 0), ("gelu", 0), ("silu", 0), ("swiglu", 1), ("identity", 0)), gated=False)
    narrow(m)


@row("MoE", domain=MICROSOFT, seeds=16)
def gated_experts(m: Model) -> None:
    m.tolerance = 2e-6
    kind, fusion = m.pick(("silu", 0), ("swiglu", 0), ("swiglu", 2))
    experts_row(m, kind, fusion, gated=not fusion)
