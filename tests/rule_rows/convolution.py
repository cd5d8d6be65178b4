"""Rows for the rules of `hyperclone_onnx.rules.convolution`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rule_rows.harness import Model, activation, letters, narrow, row


def windows(kernel: Sequence[int], attributes: dict[str, Any]) -> str:
    """The letters of spatial axes. They may grow if the window is one element that stays in its place."""
    moves = attributes.keys() & {"pads", "strides", "output_padding", "output_shape"}
    return "".join("p" if moves or n > 1 else "g" for n in kernel)


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
    x = activation(m, (m.size(1, 2), channels, *space), "." + letters((channels,)) + windows(kernel, attributes))
    operands = [x, m.operand((out, c, *kernel), letters((out, c)) + "p" * len(space))]
    if m.coin():
        operands.append(m.operand((out,), letters((out,))))
    m.node("Conv", *operands, want="." + letters((out,)) + windows(kernel, attributes), **attributes)


@row("Conv", seeds=4)
def conv_of_an_input(m: Model) -> None:
    x = m.operand((1, 3, 4, 4), "pppp", stored=False)
    m.node("Conv", x, m.operand((4, 3, 2, 2), "gppp"), want="pgpp")


@row("ConvTranspose", seeds=24)
def conv_transpose(m: Model) -> None:
    """Groups grow only if each group has one channel. Otherwise the channels of the groups grow."""
    space = tuple(m.size(3, 5) for _ in range(m.size(1, 2)))
    group, c, o = m.pick(1, 1, 2, 3), m.size(1, 3), m.size(1, 3)
    kernel = tuple(m.size(1, 2) for _ in space)
    attributes: dict[str, Any] = {"group": group} if group > 1 or m.coin() else {}
    if m.coin():
        attributes["kernel_shape"] = kernel
    if m.coin():
        attributes["strides"] = (2,) * len(space)
        attributes |= {"output_padding": (1,) * len(space)} if m.coin() else {}
    if m.coin(0.3):
        attributes |= {"output_shape": tuple(2 * n for n in space), "strides": (2,) * len(space)}
        attributes.pop("output_padding", None)
    grows = "g" if c > 1 or group > 1 else "p"
    widens = "g" if o > 1 or (c == 1 and group > 1) else "p"
    x = activation(m, (m.size(1, 2), group * c, *space), "." + grows + windows(kernel, attributes))
    operands = [x, m.operand((group * c, o, *kernel), grows + letters((o,)) + "p" * len(space))]
    if m.coin():
        operands.append(m.operand((group * o,), widens))
    if group > 1:  # the reference writes one channel for each group
        narrow(m)
    m.node("ConvTranspose", *operands, want="." + widens + windows(kernel, attributes), **attributes)


@row("ConvTranspose", seeds=4)
def conv_transpose_of_an_input(m: Model) -> None:
    x = m.operand((1, 3, 4, 4), "pppp", stored=False)
    m.node("ConvTranspose", x, m.operand((3, 4, 2, 2), "pgpp"), want="pgpp")


@row("DeformConv", seeds=16)
def deform_conv(m: Model) -> None:
    m.opset = m.pick(19, 22)
    group, together = m.pick((1, 1), (1, 2), (2, 1), (2, 4), (3, 3))
    per = m.size(1, 2) * (together // group if together > group else 1)
    o, n = m.size(1, 3), m.size(1, 2)
    operands = [
        activation(m, (n, group * per, 4, 4), "..pp"),
        m.operand((group * o, per, 2, 2), "..pp"),
        activation(m, (n, together * 8, 3, 3), ".ppp"),
    ]
    if m.coin():
        operands.append(m.operand((group * o,)) if m.coin() else "")
    if m.coin():
        operands += [""] * (4 - len(operands))
        operands.append(activation(m, (n, together * 4, 3, 3), ".ppp"))
    m.node("DeformConv", *operands, want="..pp", group=group, offset_group=together)


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
    kernel = tuple(m.size(1, 2) for _ in space)
    attributes: dict[str, Any] = {"kernel_shape": kernel}
    if m.coin():
        attributes["strides"] = (2,) * len(space)
    x = activation(m, (m.size(), m.size(), *space), "gg" + windows(kernel, attributes))
    m.node(op, x, want="gg" + windows(kernel, attributes), **attributes)


@row("MaxPool", seeds=6)
def max_pool_with_indices(m: Model) -> None:
    """MaxPool's second output has indices into the flat tensor."""
    m.runtime, m.tolerance, m.opset = True, 1e-5, 12
    x = activation(m, (2, m.size(), 4, 4), kind=np.float32)
    m.node("MaxPool", x, outputs=2, kernel_shape=m.pick((2, 2), (2, 1)))


@row("GlobalAveragePool", "GlobalMaxPool", seeds=10)
def global_pool(m: Model, op: str) -> None:
    m.equal = op == "GlobalAveragePool"
    shape = (m.size(), m.size(), *m.shape(1, 2))
    m.runtime, m.tolerance = True, 1e-6
    m.node(op, activation(m, shape, kind=np.float32), want="gg" + "p" * (len(shape) - 2))


@row("GlobalLpPool", seeds=10)
def global_norm(m: Model) -> None:
    m.opset = m.pick(13, 21)
    shape = (m.size(), m.size(), *m.shape(1, 2))
    p = m.pick(None, 1, 2, 3)
    x = activation(m, shape)
    narrow(m)
    m.node("GlobalLpPool", x, want="gg" + "p" * (len(shape) - 2), **({} if p is None else {"p": p}))


@row("LRN", seeds=6)
def local_response_norm(m: Model) -> None:
    x = activation(m, (m.size(), m.size(3), m.size(), m.size()), "gpgg")
    narrow(m)
    m.node("LRN", x, want="gpgg", size=m.pick(1, 3), alpha=0.5)


@row("Upsample", seeds=8)
def upsample(m: Model) -> None:
    m.opset = m.pick(8, 9)
    x = activation(m, (m.size(), m.size(), 2, 3), "ggpp")
    narrow(m)
    if m.opset < 9:
        m.node("Upsample", x, want="ggpp", scales=[1.0, 1.0, 2.0, 2.0])
    else:
        m.node("Upsample", x, m.operand(np.array([1, 1, 2, 2], np.float32), stored=True), want="ggpp")


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
        scales = np.array([1, 1, 2, 2], np.float32)[-count:]
        converted = m.coin()
        stored = m.operand(scales.astype(np.float16) if converted else scales, stored=True)
        inputs = [x, "", m.node("Cast", stored, to=1, inner=True) if converted else stored]
    else:
        inputs = [x, "", "", m.ints([*shape[:2], 6, 8][-count:])]
    narrow(m)
    m.node("Resize", *inputs, want=want, **attributes)
