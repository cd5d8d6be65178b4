"""Convolutions over spatial axes, as image encoders use them."""

from __future__ import annotations

from typing import Any

from hyperclone_onnx.frameworks.compiling.registry import Array, implements


def spatial_pads(
    auto_pad: str, pads: tuple[int, ...] | None, sizes: Any, kernel: Any, strides: Any, dilations: Any
) -> list[tuple[int, int]]:
    """The padding (before, after) of each spatial axis."""
    rank = len(kernel)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        padding = []
        for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
            whole = max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
            less, more = whole // 2, whole - whole // 2
            padding.append((less, more) if auto_pad == "SAME_UPPER" else (more, less))
        return padding
    if auto_pad == "VALID" or pads is None:
        return [(0, 0)] * rank
    return [(pads[i], pads[i + rank]) for i in range(rank)]


@implements("Conv")
def conv(
    xp: Any,
    x: Array,
    w: Array,
    b: Array | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: tuple[int, ...] | None = None,
    group: int = 1,
    kernel_shape: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
) -> Array:
    """out[n, o, p..] = sum_(c, k..) x[n, c, p.. stride + k.. dilation] w[o, c, k..] + b[o]"""
    rank = w.ndim - 2
    strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
    around = spatial_pads(auto_pad, pads, x.shape[2:], w.shape[2:], strides, dilations)
    out = xp.convolution(x, w, tuple(strides), tuple(dilations), around, group)
    return out if b is None else out + xp.reshape(b, (-1, *[1] * rank))
