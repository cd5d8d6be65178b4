"""Operators that rearrange, crop or sample the axes of images: batch and channels pass through them."""

from __future__ import annotations

import math

from hyperclone_onnx.algebra.dims import Product, Term
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import relates


def _block(op: Op) -> tuple[Term, Term]:
    """The rows and columns of a block. One attribute is the number of both, so neither can grow."""
    size = op.positive("blocksize")
    return op.pinned_dim(size, "the rows of a block"), op.pinned_dim(size, "the columns of a block")


def _depth(op: Op, rows: Term, columns: Term, channels: Term) -> tuple[Term, ...]:
    """The factors of an axis that holds blocks and channels."""
    first = op.text("mode", "DCR") == "DCR"
    return (rows, columns, channels) if first else (channels, rows, columns)


@relates("DepthToSpace")
def depth_to_space(op: Op) -> None:
    """Y[n, c, (h r), (w s)] = X[n, (r s c), h, w], or X[n, (c r s), h, w] in mode CRD"""
    batch, depth, height, width = op.axes(0, rank=4)
    rows, columns = _block(op)
    size, block = op.static(depth), op.integer("blocksize") ** 2
    if size is None or size % block:
        raise CannotTell("a number of channels that is not a multiple of the elements of a block")
    channels = op.dim(size // block)
    op.space.match([depth], _depth(op, rows, columns, channels))
    op.out((batch, channels, Product((height, rows)), Product((width, columns))))


@relates("SpaceToDepth")
def space_to_depth(op: Op) -> None:
    """Y[n, (r s c), h, w] = X[n, c, (h r), (w s)], or Y[n, (c r s), h, w] in mode CRD"""
    batch, channels, *space = op.axes(0, rank=4)
    rows, columns = _block(op)
    inner: list[Term] = []
    for term, part in zip(space, (rows, columns), strict=True):
        size = op.size(term).divided_by(op.size(part))
        if size is None:
            op.pin(term, "it is divided into blocks")
        inner.append(op.dim(size))
        if size is not None:
            op.space.match([term], [inner[-1], part])
    op.out((batch, Product(_depth(op, rows, columns, channels)), *inner))


@relates("Col2Im")
def col2im(op: Op) -> None:
    """Y[n, c, q] = sum of all X[n, (c k), l] for which element k of block l lies at q"""
    batch, columns, blocks = op.axes(0, rank=3)
    image, block = op.int_list("image_shape", 1), op.int_list("block_shape", 2)
    size = op.static(columns)
    if image is None or block is None or size is None or math.prod(block) < 1 or size % math.prod(block):
        raise CannotTell("a number of columns that is not a multiple of the elements of a block")
    channels = op.dim(size // math.prod(block))
    op.space.match([columns], [channels, op.pinned_dim(math.prod(block), "the elements of a block")])
    op.pin(blocks, "the blocks of an image")
    op.out((batch, channels, *(op.pinned_dim(n, "a spatial axis") for n in image)))


@relates("CenterCropPad")
def center_crop_pad(op: Op) -> None:
    """out = the middle of x, or x in the middle of zeros, along each axis that `shape` gives a size"""
    axes = list(op.axes(0))
    op.parameter(1)
    sizes = op.known(1)
    listed = op.int_list("axes", None)
    cropped = list(range(len(axes))) if listed is None else listed
    if sizes is not None and sizes.size != len(cropped):
        raise op.malformed(f"{sizes.size} sizes for {len(cropped)} axes")
    for position, axis in enumerate(cropped):
        which = op.axis(axis, len(axes))
        op.pin(axes[which], "cropped or padded")
        axes[which] = op.pinned_dim(None if sizes is None else sizes.ravel()[position], "cropped or padded")
    op.out(axes)


@relates("GridSample")
def grid_sample(op: Op) -> None:
    """Y[n, c, q] = X[n, c, around the coordinates grid[n, q, :]]"""
    batch, channels, *space = op.axes(0, least=2)
    samples, *places, point = op.axes(1, least=2)
    for term in space:
        op.pin(term, "it is sampled at coordinates")
    op.pin(point, "coordinates of a point")
    op.unify(samples, batch)
    op.out((batch, channels, *places))


@relates("RoiAlign")
def roi_align(op: Op) -> None:
    """Y[r, c, q] = X[image[r], c, part q of region r], averaged or the maximum"""
    op.unify(op.axis_of(2, 0), op.axis_of(1, 0))
    _pool_regions(op, [op.integer("output_height", 1), op.integer("output_width", 1)])


@relates("MaxRoiPool")
def max_roi_pool(op: Op) -> None:
    """Y[r, c, q] = maximum of X[image of r, c, part q of region r]"""
    _pool_regions(op, op.int_list("pooled_shape", None) or [])


def _pool_regions(op: Op, sizes: list[int]) -> None:
    batch, channels, *space = op.axes(0, least=2)
    regions, corners = op.axes(1, rank=2)
    for term in (batch, *space, corners):
        op.pin(term, "regions of it are read")
    op.out((regions, channels, *(op.pinned_dim(size, "the parts of a region") for size in sizes)))
