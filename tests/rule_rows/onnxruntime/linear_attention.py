"""Rows for the rules of `hyperclone_onnx.rules.onnxruntime.linear_attention`."""

from __future__ import annotations

from typing import Any

import numpy as np

from rule_rows.harness import MICROSOFT, Model, activation, narrow, row
from rule_rows.onnxruntime.attention import fixed, place, scaled, sequences

RULES = ("linear", "gated", "delta", "gated_delta")


@row("LinearAttention", domain=MICROSOFT, seeds=40)
def linear_attention(m: Model) -> None:
    linear_attention_row(m, 0)
    narrow(m, 1e-4)


@row("LinearAttention", domain=MICROSOFT, seeds=12)
def linear_attention_of_a_window(m: Model) -> None:
    m.tolerance = 2e-6
    linear_attention_row(m, m.size(1, 4))


def linear_attention_row(m: Model, window: int) -> None:
    m.opset, m.equal = 17, True
    b, t, few, group, d, e = 2, m.size(), m.size(1, 2), m.size(1, 2), m.size(), m.size()
    heads, kv = m.pick((few * group, few), (few, few * group))
    rule = m.pick(*RULES)
    free = "p" if rule.endswith("delta") else "g"
    inputs = [activation(m, (b, t, n * w), "gp" + c) for n, w, c in ((heads, d, "."), (kv, d, "."), (kv, e, "g"))]
    if m.coin():
        state = (b, kv, d, e)
        shape, letters = ((window, *state), "pg." + free + "g") if window else (state, "g." + free + "g")
        place(inputs, 3, m.operand(shape, letters, stored=False))
    if rule.startswith("gated"):
        place(inputs, 4, m.operand((b, t, kv * m.pick(1, d)), "gp."))
    if rule.endswith("delta"):
        place(inputs, 5, m.operand((b, t, m.pick(1, kv)), "gp."))
    attributes = {"q_num_heads": heads, "kv_num_heads": kv, "update_rule": rule, "state_window": window}
    m.node("LinearAttention", *inputs, outputs=2, domain=MICROSOFT, **attributes, **scaled(m))


@row("LinearAttentionGate", domain=MICROSOFT, seeds=6)
def linear_attention_gate(m: Model) -> None:
    m.opset = 17
    b, t, h = m.size(), m.size(), m.size()
    inputs = [activation(m, (b, t, h), "ggg"), m.operand((h,), "g"), m.operand((h,), "g")]
    inputs += [activation(m, (b, t, h), "ggg")] if m.coin() else []
    narrow(m)
    outputs = 2 if len(inputs) == 4 else 1
    m.node("LinearAttentionGate", *inputs, outputs=outputs, domain=MICROSOFT)


@row("GatedDeltaNet", domain=MICROSOFT, seeds=24)
def gated_delta_net(m: Model) -> None:
    m.equal, m.tolerance = True, 2e-6
    h, group, d, e, rule = m.size(2, 3), m.size(1, 2), m.size(), m.size(), m.pick(*RULES)
    many, normalised = h * group, m.size(0, 1)
    free = "p" if normalised or rule.endswith("delta") else "g"
    inputs: list[str] = []
    packed = m.coin(0.3)
    if m.coin():
        tokens: tuple[int, ...] = (2, m.size())
    else:
        _, ends = sequences(m)
        tokens = (ends[-1],)
        place(inputs, 3, fixed(m, ends))
    letters = "gp" if len(tokens) == 2 else "p"
    if packed:
        inputs[:3] = [activation(m, (*tokens, 2 * h * d + many * e), letters + "g"), "", ""]
    else:
        first = [activation(m, (*tokens, h, d), letters + "g" + free) for _ in range(2)]
        inputs[:3] = [*first, activation(m, (*tokens, many, e), letters + "gg")]
    attributes: dict[str, Any] = {"update_rule": rule, "qk_l2_norm": normalised}
    if rule.startswith("gated"):
        wide = m.coin(0.3)
        place(inputs, 4, m.operand((*tokens, many, *([d] if wide else [])), letters + "g" + free * wide))
    if rule.endswith("delta"):
        place(inputs, 5, m.operand((*tokens, many), letters + "g"))
        attributes["beta_activation"] = m.pick("none", "sigmoid")
    if packed or m.coin():
        place(inputs, 6, m.operand((2, many, e, d), letters[0] + "gg" + free, stored=False))
    if rule.startswith("gated") and m.coin() and not wide:
        attributes["gate_activation"] = "qwen"
        place(inputs, 7, m.operand((many,), "g"))
        place(inputs, 8, m.operand((many,), "g"))
    m.node("GatedDeltaNet", *inputs, outputs=2, domain=MICROSOFT, **attributes, **scaled(m))


@row("CausalConvWithState", domain=MICROSOFT, seeds=24)
def causal_convolution(m: Model) -> None:
    m.opset = 17
    causal_convolution_row(m, 0)
    narrow(m)


@row("CausalConvWithState", domain=MICROSOFT, seeds=12)
def causal_convolution_of_a_window(m: Model) -> None:
    causal_convolution_row(m, m.size(1, 4))


def causal_convolution_row(m: Model, window: int) -> None:
    b, t, k, dilation = m.size(), m.size(), m.size(2, 4), m.size(1, 2)
    last = m.coin()
    shape = tuple(m.size(2, 4) for _ in range(m.size(1, 2) if last else 1))
    channels, states = int(np.prod(shape)), (k - 1) * dilation
    letters = "gp" + "g" * len(shape) if last else "ggp"
    inputs = [activation(m, (b, t, *shape) if last else (b, channels, t), letters)]
    inputs += [m.operand((channels, 1, k), "g.p"), m.operand((channels,), "g") if m.coin() else ""]
    if m.coin():
        state = (b, states, *shape) if last else (b, channels, states)
        inputs.append(m.operand((window, *state) if window else state, "p" * bool(window) + letters, stored=False))
    attributes = {"dilation": dilation, "channels_last": int(last), "state_window": window}
    attributes["activation"] = m.pick("none", "silu")
    m.node("CausalConvWithState", *inputs, outputs=2, domain=MICROSOFT, want=letters, **attributes)


@row("VarlenCausalConvWithState", domain=MICROSOFT, seeds=12)
def packed_causal_convolution(m: Model) -> None:
    channels, k, dilation, capacity = m.size(), m.size(2, 4), m.size(1, 2), m.pick(0, 2)
    _, ends = sequences(m)
    inputs = [activation(m, (ends[-1], channels), "pg"), m.operand((channels, 1, k), "g.p"), fixed(m, ends)]
    inputs.append(m.operand((channels,), "g") if m.coin() else "")
    inputs.append(m.operand((2, channels, (k - 1) * dilation), "pgp", stored=False))
    if capacity:
        inputs.append(fixed(m, [1, 2]))
    attributes = {"dilation": dilation, "state_update_capacity": capacity, "activation": m.pick("none", "silu")}
    outputs = 3 if capacity else 2
    m.node("VarlenCausalConvWithState", *inputs, outputs=outputs, domain=MICROSOFT, want="pg", **attributes)
