"""Rows for the rules of `hyperclone_onnx.rules.spatial`."""

from __future__ import annotations

from typing import Any

import numpy as np

from rule_rows.harness import Model, activation, letters, narrow, row


def mode(m: Model, since: int) -> dict[str, Any]:
    if m.opset < since:
        return {}
    return m.pick({}, {"mode": "DCR"}, {"mode": "CRD"})


@row("DepthToSpace", seeds=12)
def depth_to_space(m: Model) -> None:
    block, c = m.size(1, 3), m.size(1, 4)
    x = activation(m, (m.size(), block * block * c, m.size(), m.size()), "g" + letters((c,)) + "gg")
    m.node("DepthToSpace", x, want="g" + letters((c,)) + "gg", blocksize=block, **mode(m, 13))


@row("SpaceToDepth", seeds=12)
def space_to_depth(m: Model) -> None:
    m.opset = m.pick(13, 28)
    block, c = m.size(1, 3), m.size(1, 4)
    x = activation(m, (m.size(), c, block * m.size(), block * m.size()), "g" + letters((c,)) + "gg")
    m.node("SpaceToDepth", x, want="g" + letters((c,)) + "gg", blocksize=block, **mode(m, 28))


@row("Col2Im", seeds=8)
def col2im(m: Model) -> None:
    m.opset = max(m.opset, 18)
    c = m.size()
    x = activation(m, (m.size(1, 2), c * 4, 6), ".gp")
    m.node("Col2Im", x, m.ints([3, 4]), m.ints([2, 2]), want=".gpp")


@row("CenterCropPad", seeds=8)
def center_crop_pad(m: Model) -> None:
    m.opset = max(m.opset, 18)
    axes = m.pick([2, 3], [-1], None)
    want = "pppp" if axes is None else "".join("p" if i in axes or i - 4 in axes else "g" for i in range(4))
    x = activation(m, (m.size(), m.size(), 4, 5), want)
    shape = m.ints([m.size(1, 7) for _ in axes or range(4)])
    m.node("CenterCropPad", x, shape, want="." * 4, **({} if axes is None else {"axes": axes}))


@row("GridSample", seeds=8)
def grid_sample(m: Model) -> None:
    m.opset = m.pick(20, 22)
    n, c = m.size(), m.size()
    x = activation(m, (n, c, 4, 5), "ggpp")
    grid = activation(m, (n, m.size(), m.size(), 2), "gggp")
    m.node("GridSample", x, grid, want="gggg", mode=m.pick("linear", "nearest"), align_corners=m.size(0, 1))


@row("RoiAlign", seeds=8)
def roi_align(m: Model) -> None:
    m.opset = m.pick(16, 21)
    n, regions = m.size(), m.size()
    corners = np.sort(m.rng.uniform(0, 4, (regions, 2, 2)), axis=1).reshape(regions, 4)
    operands = [
        activation(m, (n, m.size(), 5, 5), "pgpp"),
        m.operand(corners, "gp"),
        m.operand(m.rng.integers(0, n, (regions,)), "g"),
    ]
    attributes: dict[str, Any] = {"output_height": 2, "output_width": 3} if m.coin() else {}
    narrow(m)
    m.node("RoiAlign", *operands, want="gg..", mode=m.pick("avg", "max"), sampling_ratio=2, **attributes)


@row("MaxRoiPool", seeds=6)
def max_roi_pool(m: Model) -> None:
    m.opset = 21
    n, regions = m.size(), m.size()
    corners = np.sort(m.rng.integers(0, 4, (regions, 2, 2)), axis=1).reshape(regions, 4)
    which = m.rng.integers(0, n, (regions, 1))
    boxes = m.operand(np.concatenate([which, corners], axis=1).astype(np.float64), "gp")
    x = activation(m, (n, m.size(), 5, 5), "pgpp")
    narrow(m)
    m.node("MaxRoiPool", x, boxes, want="ggpp", pooled_shape=[2, 3])
