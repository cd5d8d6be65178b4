"""Rows for the rules of `hyperclone_onnx.rules.onnxruntime.convolution`."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from rule_rows.harness import MICROSOFT, Model, activation, narrow, row


def convolution(m: Model, op: str) -> None:
    last, n = op.startswith("Nhwc"), m.size()
    group, c, o, high, wide = m.pick(1, 1, 2), m.size(2, 3), m.size(2, 3), m.size(3, 5), m.size(3, 5)
    channels, out = group * c, group * o
    x = activation(m, (n, high, wide, channels) if last else (n, channels, high, wide), "gppg" if last else "ggpp")
    inputs = [x, m.operand((out, c, 2, 2), "ggpp"), m.operand((out,), "g") if m.coin() else ""]
    attributes: dict[str, Any] = {"group": group} if group > 1 else {}
    if "Fused" in op:
        attributes["activation"] = "Relu"
        if m.coin():
            space = (high - 1, wide - 1)
            inputs.append(m.operand((n, *space, out) if last else (n, out, *space)))
    m.node(op, *inputs, domain=MICROSOFT, want="gppg" if last else "ggpp", **attributes)


@row("FusedConv", domain=MICROSOFT, seeds=12)
def fused_convolution(m: Model, op: str) -> None:
    m.opset = 17
    convolution(m, op)
    narrow(m)


@row("NhwcConv", "NhwcFusedConv", domain=MICROSOFT, seeds=12)
def channels_last_convolution(m: Model, op: str) -> None:
    convolution(m, op)


@row("FusedConv", domain=MICROSOFT, seeds=2)
def fused_convolution_of_an_input(m: Model) -> None:
    m.opset = 17
    x = m.operand((1, 3, 4, 4), "pppp", stored=False)
    w = m.operand((4, 3, 2, 2), "gppp")
    narrow(m)
    m.node("FusedConv", x, w, domain=MICROSOFT, want="pgpp")


@row("ConvTransposeWithDynamicPads", domain=MICROSOFT, seeds=8)
def transposed_convolution(m: Model) -> None:
    m.opset = 17
    x = activation(m, (m.size(), c := m.size(), 3, 4), "ggpp")
    inputs = [x, m.operand((c, o := m.size(), 2, 2), "ggpp"), m.ints([0, 1, 0, 1])]
    inputs += [m.operand((o,), "g")] if m.coin() else []
    narrow(m)
    m.node("ConvTransposeWithDynamicPads", *inputs, domain=MICROSOFT, want="ggpp")


@row("NhwcMaxPool", domain=MICROSOFT, seeds=4)
def max_pool(m: Model) -> None:
    m.runtime, m.opset, m.kind = True, 17, TensorProto.UINT8
    x = activation(m, (m.size(), 4, 5, m.size()), "gppg", kind=np.uint8)
    m.node("NhwcMaxPool", x, domain=MICROSOFT, want="gppg", kernel_shape=(2, 2))


@row("GridSample", domain=MICROSOFT, seeds=6)
def grid_sample(m: Model) -> None:
    m.opset = 17
    x, grid = activation(m, (n := m.size(), m.size(), 3, 4), "ggpp"), m.operand((n, 2, 3, 2), "gppp")
    narrow(m)
    m.node("GridSample", x, grid, domain=MICROSOFT, want="ggpp", mode=m.pick("bilinear", "nearest"))


@row("CropAndResize", domain=MICROSOFT, seeds=6)
def crop_and_resize(m: Model) -> None:
    m.opset = 17
    count = m.size()
    inputs = [activation(m, (2, m.size(), 4, 5), "pgpp"), m.operand((count, 4), "gp")]
    inputs += [
        m.operand(m.rng.integers(0, 2, count).astype(np.int32), "g"),
        m.operand(np.array([2, 3], np.int32), stored=True),
    ]
    narrow(m)
    m.node("CropAndResize", *inputs, domain=MICROSOFT, want="ggpp")
