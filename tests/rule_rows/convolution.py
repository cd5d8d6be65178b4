"""Rows for the rules of `hyperclone_onnx.rules.convolution`."""

from __future__ import annotations

from typing import Any

import numpy as np

from rule_rows.harness import Model, activation, letters, narrow, row


@row("Conv", seeds=24)
def conv(m: Model) -> None:
    space = tuple(m.size(3, 5) for _ in range(m.size(1, 2)))
    group = m.pick(1, 1, 2, 3)
    c, o = m.size(1, 3), m.size(1, 3)
    kernel = tuple(m.size(1, 2) for _ in space)
    attributes: dict[str, Any] = {"group": group} if group > 1 or m.coin() else {}
    if m.coin():
        attributes["kernel_shape"] = kernel
    if m.coin():
        attributes["pads"] = (1,) * (2 * len(space))
    if m.coin():
        attributes["strides"] = (2,) * len(space)
    channels, out = group * c, group * o
    x = activation(m, (m.size(1, 2), channels, *space), "." + letters((channels,)) + "p" * len(space))
    operands = [x, m.operand((out, c, *kernel), letters((out, c)) + "p" * len(space))]
    if m.coin():
        operands.append(m.operand((out,), letters((out,))))
    m.node("Conv", *operands, want="." + letters((out,)) + "p" * len(space), **attributes)


@row("Conv", seeds=4)
def conv_of_an_input(m: Model) -> None:
    x = m.operand((1, 3, 4, 4), "pppp", stored=False)
    m.node("Conv", x, m.operand((4, 3, 2, 2), "gppp"), want="pgpp")


@row("BatchNormalization", seeds=6)
def batch_norm(m: Model) -> None:
    m.opset = m.pick(14, 15, 21)
    c = m.size()
    shape = (m.size(), c, *m.shape(0, 2))
    m.node("BatchNormalization", activation(m, shape), *(m.operand((c,), "g") for _ in range(4)), want="g" * len(shape))


@row("BatchNormalization", seeds=8)
def batch_norm_in_training(m: Model) -> None:
    """Its statistics are averages over the batch and the space."""
    m.opset, m.equal = m.pick(14, 15, 21), True
    c = m.size()
    shape = (m.size(), c, *m.shape(0, 2))
    statistics = [m.operand((c,), "g") for _ in range(4)]
    m.node("BatchNormalization", activation(m, shape), *statistics, outputs=3, training_mode=1)


@row("InstanceNormalization", seeds=12)
def instance_norm(m: Model) -> None:
    m.equal = True
    c = m.size()
    shape = (m.size(), c, *m.shape(1, 2))
    m.node(
        "InstanceNormalization",
        activation(m, shape),
        m.operand((c,), "g"),
        m.operand((c,), "g"),
        want=".g..."[: len(shape)],
    )


@row("AveragePool", "MaxPool", "LpPool", seeds=8)
def pool(m: Model, op: str) -> None:
    m.opset = m.pick(13, 18) if op != "LpPool" else 18
    space = tuple(m.size(3, 5) for _ in range(m.size(1, 2)))
    x = activation(m, (m.size(), m.size(), *space), "gg" + "p" * len(space))
    attributes: dict[str, Any] = {"kernel_shape": (2,) * len(space)}
    if m.coin():
        attributes["strides"] = (2,) * len(space)
    m.node(op, x, want="gg" + "p" * len(space), **attributes)


@row("MaxPool", seeds=6)
def max_pool_with_indices(m: Model) -> None:
    """Its indices are flat over the whole tensor."""
    m.runtime, m.tolerance, m.opset = True, 1e-5, 12
    x = activation(m, (2, m.size(), 4, 4), kind=np.float32)
    m.node("MaxPool", x, outputs=2, kernel_shape=(2, 2))


@row("GlobalAveragePool", "GlobalMaxPool", seeds=10)
def global_pool(m: Model, op: str) -> None:
    m.equal = op == "GlobalAveragePool"
    shape = (m.size(), m.size(), *m.shape(1, 2))
    m.runtime, m.tolerance = True, 1e-6
    m.node(op, activation(m, shape, kind=np.float32), want="gg" + "p" * (len(shape) - 2))


@row("Resize", seeds=16)
def resize(m: Model) -> None:
    shape = (m.size(), m.size(), 3, 4)
    want = "ggpp"
    attributes: dict[str, Any] = {"mode": m.pick("nearest", "linear"), "coordinate_transformation_mode": "asymmetric"}
    if m.opset >= 18 and m.coin():
        attributes["axes"] = m.pick([2, 3], [-2, -1], [3])
        want = "gg.p"
    x = activation(m, shape, want)
    count = len(attributes.get("axes", shape))
    if m.coin():
        inputs = [x, "", m.operand(np.array([1, 1, 2, 2], np.float32)[-count:], stored=True)]
    else:
        inputs = [x, "", "", m.ints([*shape[:2], 6, 8][-count:])]
    narrow(m)
    m.node("Resize", *inputs, want=want, **attributes)
