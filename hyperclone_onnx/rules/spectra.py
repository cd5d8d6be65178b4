"""Fourier transforms. A repeated signal has another spectrum, so the transformed axis keeps its size."""

from __future__ import annotations

from hyperclone_onnx.algebra.sizes import Size
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import relates


@relates("DFT")
def dft(op: Op) -> None:
    """Y[.., k, .., :] = sum_n exp(-2 pi i k n / N) X[.., n, .., :]: a repeated signal has another spectrum"""
    axes = list(op.axes(0, least=2))
    op.parameter(1)
    axis = _dft_axis(op, len(axes))
    for which in (axis, -1):
        op.pin(axes[which], "transformed by DFT")
    axes[axis] = op.pinned_dim(_dft_length(op, axis), "transformed by DFT")
    back_to_real = op.integer("onesided", 0) and op.integer("inverse", 0)
    axes[-1] = op.pinned_dim(1 if back_to_real else 2, "a complex number")
    op.out(axes)


def _dft_axis(op: Op, rank: int) -> int:
    if op.opset < 20:
        return op.axis(op.integer("axis", 1), rank)
    number = -2
    if op.has(2):
        op.parameter(2)
        value = op.element(2)
        if value is None or value.static is None:
            raise CannotTell("an axis whose number is computed at run time")
        number = value.static
    return op.axis(number, rank)


def _dft_length(op: Op, axis: int) -> Size | None:
    """The output's length along the transformed axis. None if the file does not declare a length that may change."""
    declared = op.declared(op.node.outputs[0])
    if declared is not None and len(declared) == op.rank(0):
        return declared[axis]
    return None if op.has(1) or op.integer("onesided", 0) else op.size(op.axis_of(0, axis))


@relates("STFT")
def stft(op: Op) -> None:
    """Y[b, f, k, :] = sum_n exp(-2 pi i k n / N) window[n] X[b, step f + n, :]"""
    batch, *rest = op.axes(0, least=2)
    for index in range(1, op.count):
        op.parameter(index)
    for term in rest:
        op.pin(term, "transformed by STFT")
    declared = op.declared(op.node.outputs[0]) or [None, None, None, Size.of(2)]
    op.out((batch, *(op.pinned_dim(size, "transformed by STFT") for size in declared[1:])))
