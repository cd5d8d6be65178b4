"""Rows for the rules of `hyperclone_onnx.rules.spectra`."""

from __future__ import annotations

from typing import Any

from rule_rows.harness import Model, row


@row("DFT", seeds=16)
def dft(m: Model) -> None:
    m.opset = m.pick(17, 20)
    shape = (*m.shape(1, 3), m.pick(1, 2))
    axis = m.size(0, len(shape) - 2)
    want = "".join("p" if i in (axis, len(shape) - 1) else "g" for i in range(len(shape)))
    attributes: dict[str, Any] = {"inverse": 1} if m.coin() else {"onesided": 1} if shape[-1] == 1 else {}
    inputs = [m.operand(shape, want, stored=False)]
    if m.coin(0.3):
        inputs.append(m.ints(6))
    if m.opset < 20:
        attributes["axis"] = axis
    elif axis != len(shape) - 2 or m.coin():
        inputs += [""] * (2 - len(inputs)) + [m.ints(axis - m.pick(0, len(shape)))]
    m.node("DFT", *inputs, want=want, **attributes)


@row("STFT", seeds=6)
def stft(m: Model) -> None:
    m.opset = m.pick(17, 21)
    x = m.operand((m.size(), 12, 1), "gpp", stored=False)
    inputs = [x, m.ints(2), m.operand((4,), "p", stored=True)]
    m.node("STFT", *inputs, *([m.ints(4)] if m.coin() else []), want="gppp", onesided=m.size(0, 1))
