"""Rows for the rules of `hyperclone_onnx.rules.flex_attention`."""

from __future__ import annotations

from typing import Any

from onnx import TensorProto, helper

from rule_rows.harness import PREVIEW, Model, activation, row


@row("FlexAttention", domain=PREVIEW, seeds=16)
def flex_attention(m: Model) -> None:
    m.opset, m.equal, m.tolerance = 23, True, 1e-6
    b, s, t, kv, group, d, e = 2, m.size(), m.size(), m.size(1, 3), m.size(1, 2), m.size(), m.size()
    heads = kv * group
    shapes = ((b, heads, s, d), (b, kv, t, d), (b, kv, t, e))
    attributes: dict[str, Any] = {"scale": 0.3} if m.coin() else {}
    for name, op in (("score_mod", "Tanh"), ("prob_mod", "Sqrt")):
        if m.coin():
            infos = [helper.make_tensor_value_info(v, TensorProto.DOUBLE, (b, heads, s, t)) for v in (name, f"{name}d")]
            body = helper.make_node(op, [name], [f"{name}d"], name=f"{name}n")
            attributes[name] = helper.make_graph([body], name, infos[:1], infos[1:])
    m.node("FlexAttention", *(activation(m, shape) for shape in shapes), domain=PREVIEW, want="g.gg", **attributes)
