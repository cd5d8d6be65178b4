"""Rows for the rules of `hyperclone_onnx.rules.onnxruntime.branches`."""

from __future__ import annotations

from typing import Any

from rule_rows.harness import MICROSOFT, Model, activation, narrow, row


def streams(m: Model) -> tuple[str, dict[str, Any], tuple[int, int, int, int]]:
    """Branches, grouped or flattened; (batch, length, branches, features)."""
    m.opset = 17
    b, s, c, h = m.size(), m.size(), m.size(2, 3), m.size()
    if m.coin():
        return activation(m, (b, s, c, h), "ggpg"), {}, (b, s, c, h)
    return activation(m, (b, s, c * h), "ggg"), {"num_branches": c}, (b, s, c, h)


def gates(m: Model, c: int, h: int, flat: bool) -> tuple[int, ...]:
    return tuple(m.pick((c,), (c, 1), (c, h), (c * h,) if flat else (c, h)))


@row("BranchwiseRMSNorm", domain=MICROSOFT, seeds=12)
def branchwise_norm(m: Model) -> None:
    m.equal = True
    x, attributes, (_, _, c, h) = streams(m)
    inputs = [x, *([m.operand(m.pick((c * h,), (c, h), (h,)))] if m.coin(0.8) else [])]
    narrow(m, 3e-4)
    m.node("BranchwiseRMSNorm", *inputs, domain=MICROSOFT, epsilon=1e-6, **attributes)


@row("HyperConnectionPreMix", domain=MICROSOFT, seeds=12)
def pre_mix(m: Model) -> None:
    x, attributes, (b, s, c, h) = streams(m)
    inputs = [x, m.operand((b, s, *gates(m, c, h, bool(attributes))))]
    narrow(m)
    m.node("HyperConnectionPreMix", *inputs, domain=MICROSOFT, want="ggg", reduction_scale=0.5, **attributes)


@row("HyperConnectionPostMix", domain=MICROSOFT, seeds=12)
def post_mix(m: Model) -> None:
    x, attributes, (b, s, c, h) = streams(m)
    inputs = [x, activation(m, (b, s, h), "ggg"), m.operand((b, s, *gates(m, c, h, False)))]
    inputs += [m.operand((b, s, c, c), "ggpp")] if m.coin() else []
    narrow(m)
    m.node("HyperConnectionPostMix", *inputs, domain=MICROSOFT, **attributes)


@row("EngramGate", domain=MICROSOFT, seeds=12)
def engram_gate(m: Model) -> None:
    m.opset, m.equal = 17, True
    b, s, c, h = m.size(), m.size(), m.size(), m.size()
    inputs = [activation(m, (b, s, c, h), "gggg") for _ in range(2)]
    inputs += [activation(m, (b, s, h), "ggg"), m.operand((c, h), "gg"), m.operand((c, h), "gg")]
    inputs += [m.operand((c, h), "gg")] if m.coin() else []
    narrow(m, 1e-4)
    m.node("EngramGate", *inputs, outputs=2 if len(inputs) == 6 else 1, domain=MICROSOFT)


@row("GatedAdd", domain=MICROSOFT, seeds=4)
def gated_add(m: Model) -> None:
    m.opset = 17
    shape = m.shape()
    inputs = [activation(m, shape, "g" * len(shape)), m.operand(shape), m.operand((*shape[:-1], 1))]
    narrow(m)
    m.node("GatedAdd", *inputs, domain=MICROSOFT)


@row("GatedRMSNorm", domain=MICROSOFT, seeds=10)
def gated_norm(m: Model) -> None:
    m.opset, m.equal = 17, True
    b, s, groups, h = m.size(), m.size(), m.size(1, 3), m.size()
    x, z = (activation(m, (b, s, groups * h), "ggg") for _ in range(2))
    scale = m.operand((h,), "g")
    narrow(m, 3e-4)
    m.node("GatedRMSNorm", x, scale, z, domain=MICROSOFT, activation=m.pick("silu", "swish", "sigmoid"))
