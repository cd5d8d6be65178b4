"""Operators over (batch, channels, space...): channels are features, the space keeps its size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from hyperclone_onnx.algebra import shape_values as known
from hyperclone_onnx.algebra.dims import ONE, Term, product
from hyperclone_onnx.algebra.sizes import Size
from hyperclone_onnx.rules.dimensions import Axes, Fact
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, relates


def _spatial(op: Op, kernel: Sequence[int | None], count: WindowCount | None = None, fixed: bool = True) -> list[Term]:
    """The spatial axes of the output. Those of the input are pinned, because a window moves along them.

    A size that is not known before running is taken from the shape that the file declares. If the window is a single
    element that always reads its own place (`fixed`), the axis passes through and is not pinned.
    """
    inner = op.axes(0, least=2)[2:]
    if len(kernel) != len(inner):
        raise op.malformed(f"its kernel has {len(kernel)} axes, and its input {len(inner)} spatial axes")
    passing = [fixed and _stays(op, axis, kernel[axis]) for axis in range(len(inner))]
    for term, passes in zip(inner, passing, strict=True):
        if not passes:
            op.fact(Fact.SPATIAL, term)
            op.pin(term, "a spatial axis")
    declared = op.declared(op.node.outputs[0])
    sizes: Sequence[Size | None] = [None] * len(inner)
    if declared is not None and len(declared) == len(inner) + 2:
        sizes = declared[2:]
    made = [(count or _window_count)(op, axis, op.size(term), kernel[axis]) for axis, term in enumerate(inner)]
    out: list[Term] = []
    for term, passes, computed, size in zip(inner, passing, made, sizes, strict=True):
        out.append(term if passes else op.pinned_dim(computed if computed is not None else size, "a spatial axis"))
        if not passes:
            op.fact(Fact.SPATIAL, out[-1])
    return out


def _stays(op: Op, axis: int, kernel: int | None) -> bool:
    """Whether output j reads input j only: a window of one element, a step of 1, and no padding."""
    before, after = _pads(op, axis)
    more = _per_axis(op, "output_padding", 0)[axis]
    whole = op.int_list("output_shape", None) is None and not before and not after and not more
    return kernel == 1 and _strides(op)[axis] == 1 and whole


def _per_axis(op: Op, name: str, default: int) -> list[int]:
    """An attribute that holds one number for each spatial axis."""
    count = op.rank(0) - 2
    return op.int_list(name, None, length=count) or [default] * count


def _strides(op: Op) -> list[int]:
    strides = _per_axis(op, "strides", 1)
    if min(strides, default=1) < 1:
        raise op.malformed(f"strides {strides}, which must be at least 1")
    return strides


def _pads(op: Op, axis: int) -> tuple[int, int]:
    """The padding before and after a spatial axis."""
    count = op.rank(0) - 2
    pads = op.int_list("pads", None, length=2 * count) or [0] * (2 * count)
    return pads[axis], pads[axis + count]


WindowCount = Callable[[Op, int, Size, int | None], Size | None]
"""Takes (operator, spatial axis, its size, the kernel's size) and gives the output's size, None if it is not known."""


def _window_count(op: Op, axis: int, size: Size, kernel: int | None) -> Size | None:
    """The number of windows along a spatial axis, None if it is not known."""
    stride, dilation = _strides(op)[axis], _per_axis(op, "dilations", 1)[axis]
    padding = op.text("auto_pad", "NOTSET")
    if kernel is None or op.integer("ceil_mode", 0):
        return None
    if padding in ("SAME_UPPER", "SAME_LOWER"):
        return known.ceil_of(size, stride)
    padded = size if padding == "VALID" else size + sum(_pads(op, axis))
    windows = known.floor_of(padded - dilation * (kernel - 1) - 1, stride)
    return None if windows is None else windows + 1


def _spread_count(op: Op, axis: int, size: Size, kernel: int | None) -> Size | None:
    """The size of a spatial axis of a transposed convolution's output, None if it is not known."""
    count = op.rank(0) - 2
    shape = op.int_list("output_shape", None)
    if shape is not None:
        if len(shape) < count:
            raise op.malformed(f"output_shape has {len(shape)} elements for {count} spatial axes")
        return Size.of(shape[-count:][axis])
    if kernel is None or op.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    stride, dilation = _strides(op)[axis], _per_axis(op, "dilations", 1)[axis]
    more = _per_axis(op, "output_padding", 0)[axis]
    return (size - 1) * stride + more + dilation * (kernel - 1) + 1 - sum(_pads(op, axis))


def _grouped(op: Op, term: Term, group: int) -> tuple[Term, Term]:
    """Split an axis of channels into (groups, channels of a group)."""
    size = op.static(term)
    if group == 1:
        return ONE, term
    if size is None or size % group:
        raise CannotTell("a number of channels that is not a multiple of the number of groups")
    parts = op.dim(group), op.dim(size // group)
    op.space.match([term], parts)
    return parts


def relate_conv(
    op: Op,
    data: int,
    weight: int,
    bias: int,
    *,
    integers: bool = False,
    scales: tuple[int, ...] = (),
    biases: tuple[int, ...] = (),
    fixed: bool = True,
) -> None:
    """Relate a convolution of input `data` with input `weight`; see `_spatial` and `Op.sum_over` for the rest."""
    x, w = op.axes(data, least=2), op.axes(weight, rank=op.rank(data))
    group = op.positive("group", 1)
    for term in w[2:]:
        op.pin(term, "a convolution's kernel")
    groups, channels = _grouped(op, x[1], group)
    out_groups, _ = _grouped(op, w[0], group)
    op.unify(groups, out_groups)
    op.fact(Fact.GROUPED, groups)
    op.unify(channels, w[1])
    op.sum_over((weight, 1), integers=integers, scales=scales, biases=biases)
    op.fact(Fact.CONTRACTED_WITH_WEIGHT, w[1])
    op.fact(Fact.WEIGHT_OUTPUT, w[0])
    if op.value(data).is_graph_input():
        op.pin(x[1], "the channels of an input")
    if op.has(bias):
        op.unify(op.axis_of(bias, 0), w[0])
    op.out((x[0], w[0], *_spatial(op, [op.static(term) for term in w[2:]], fixed=fixed)))


@relates("Conv")
def conv(op: Op) -> None:
    """Y[n, (g m), p] = sum_{c, k} X[n, (g c), p + k] W[(g m), c, k] + B[(g m)]"""
    relate_conv(op, 0, 1, 2)


@relates("DeformConv")
def deform_conv(op: Op) -> None:
    """Conv that reads X[n, (f c), p + k + offset[n, (f k), p]] mask[n, (f k), p]"""
    relate_conv(op, 0, 1, 3, fixed=False)
    x = op.axes(0)
    op.pin(_grouped(op, x[1], op.positive("offset_group", 1))[0], "groups of channels that share their offsets")
    for index in (2, 4):
        if op.has(index):
            batch, kernel, *space = op.axes(index, least=2)
            op.unify(batch, x[0])
            for term in (kernel, *space):
                op.pin(term, "a convolution's kernel or a spatial axis")


@relates("ConvTranspose")
def conv_transpose(op: Op) -> None:
    """Y[n, (g m), q] = sum_{c, p, k: p + k = q} X[n, (g c), p] W[(g c), m, k] + B[(g m)]"""
    x, w = op.axes(0, least=2), op.axes(1, rank=op.rank(0))
    group = op.positive("group", 1)
    for term in w[2:]:
        op.pin(term, "a convolution's kernel")
    op.unify(x[1], w[0])
    groups, channels = _grouped(op, w[0], group)
    if not op.is_one(channels):
        op.pin(groups, "groups of a transposed convolution that also sums over channels")
        op.sum_over((0, 1), (1, 0))
    out = product(groups, w[1])
    op.fact(Fact.CONTRACTED_WITH_WEIGHT, channels)
    op.fact(Fact.WEIGHT_OUTPUT, out)
    if op.value(0).is_graph_input():
        op.pin(x[1], "the channels of an input")
    if op.has(2):
        op.unify(op.axis_of(2, 0), out)
    op.out((x[0], out, *_spatial(op, [op.static(term) for term in w[2:]], _spread_count)))


@edits("ConvTranspose")
def edit_conv_transpose(op: GrownOp) -> None:
    """Sets the number of groups if there are as many groups as channels. Any other number keeps its size."""
    channels = op.axis_of(1, 0)
    if op.integer("group", 1) > 1 and op.static(channels) == op.integer("group"):
        op.set_attribute("group", op.grown(channels))


@edits("Conv", "DeformConv")
def edit_conv(op: GrownOp) -> None:
    """Sets the attribute `group`: all channels divided by the channels of one group."""
    edit_groups(op, 1)


def edit_groups(op: GrownOp, weight: int) -> None:
    """Set the group attribute of a convolution with input `weight`."""
    if op.integer("group", 1) > 1:
        op.set_attribute("group", op.grown(op.axis_of(0, 1)) // op.grown(op.axis_of(weight, 1)))


@relates("BatchNormalization", "InstanceNormalization")
def channel_norm(op: Op) -> None:
    """Y[n, c, p] = scale[c] (X[n, c, p] - mean[c]) / sqrt(var[c] + eps) + B[c]; mean and var belong to one channel"""
    x = op.axes(0, least=2)
    if op.node.op_type == "InstanceNormalization":
        averaged: Axes = x[2:]
    else:
        averaged = (x[0], *x[2:]) if op.integer("training_mode", 0) else ()
    for term in averaged:
        op.uniform(term)
    for index in range(1, op.count):
        op.unify(op.axis_of(index, 0), x[1])
    op.out(x)
    for index in range(1, len(op.node.outputs)):
        op.out((x[1],), index=index)


@relates("AveragePool", "MaxPool", "LpPool")
def pool(op: Op) -> None:
    """Y[n, c, p] pools X[n, c, window of p]"""
    x = op.axes(0, least=2)
    out = (x[0], x[1], *_spatial(op, op.int_list("kernel_shape", None) or [None] * (len(x) - 2)))
    if op.node.op_type == "MaxPool" and len(op.node.outputs) > 1:
        for term in x:
            op.pin(term, "MaxPool returns flat indices, which depend on its size")
    op.out(out)
    op.out(out, index=1)


@relates("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(op: Op) -> None:
    """Y[n, c, 1...] pools X[n, c, all]: the mean, the maximum or (sum |X|^p)^(1/p)"""
    x = op.axes(0, least=2)
    for axis in range(2, len(x)):
        match op.node.op_type:
            case "GlobalAveragePool":
                op.uniform(x[axis])
            case "GlobalLpPool" if op.is_constant(0):
                op.pin(x[axis], "the absolute values of a weight's shares do not add up to that of the weight")
            case "GlobalLpPool":
                op.sum_over((0, axis), power=1.0 / op.positive("p", 2))
    op.out((x[0], x[1], *[ONE] * (len(x) - 2)))


@relates("LRN")
def local_response_norm(op: Op) -> None:
    """Y[n, c, p] = X[n, c, p] / (bias + alpha / size sum_{|i - c| < size / 2} X[n, i, p]^2)^beta"""
    op.pin(op.axis_of(0, 1), "a window moves along it")
    op.out(op.axes(0))


@relates("Upsample")
def upsample(op: Op) -> None:
    """Y[n, c, p'] samples X[n, c, p]; axes whose scale is 1 keep their elements"""
    x = op.axes(0)
    op.parameter(1)
    scales = op.numbers("scales")
    if op.has(1) and (tensor := op.value(1).const_value) is not None:
        scales = tensor.numpy().ravel().tolist()
    if scales is not None and len(scales) != len(x):
        raise op.malformed(f"{len(scales)} scales for {len(x)} axes")
    declared = op.declared(op.node.outputs[0])
    if declared is None or len(declared) != len(x):
        declared = [None] * len(x)
    out = list(x)
    for axis, size in enumerate(declared):
        if scales is None or scales[axis] != 1.0:
            op.pin(x[axis], "resized")
            out[axis] = op.pinned_dim(size, "resized")
    op.out(out)


@relates("Resize")
def resize(op: Op) -> None:
    """Y[n, c, p'] samples X[n, c, p]; axes whose scale is 1 keep their elements"""
    x = op.axes(0)
    for index in (1, 2, 3):
        op.parameter(index)
    declared = op.declared(op.node.outputs[0])
    listed = op.int_list("axes", None)
    moved = set(range(2, len(x))) if listed is None else {op.axis(axis, len(x)) for axis in listed}
    sizes = op.known(3)
    if listed is None and sizes is not None:
        if sizes.size != len(x):
            raise op.malformed(f"{sizes.size} sizes for {len(x)} axes")
        moved |= {i for i, term in enumerate(x[:2]) if sizes.ravel()[i] != op.size(term)}
    elif listed is None and op.has(2) and not _unscaled(op, 2):
        moved |= set(range(min(len(x), 2)))
    for axis in moved:
        op.pin(x[axis], "resized")
    lengths = _resized_lengths(op, list(range(len(x))) if listed is None else [op.axis(i, len(x)) for i in listed])
    if declared is not None and len(declared) == len(x):
        for i, size in enumerate(declared):
            if i not in lengths or (size is not None and size.static is not None):
                lengths[i] = size
    op.out([op.pinned_dim(lengths.get(i), "resized") if i in moved else term for i, term in enumerate(x)])


def _resized_lengths(op: Op, axes: Sequence[int]) -> dict[int, Size | None]:
    """The lengths of axes that are resized, from the sizes or the scales, where these are known."""
    if op.text("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return {}
    sizes = op.known(3)
    if sizes is not None and sizes.size == len(axes):
        stretched = op.text("keep_aspect_ratio_policy", "stretch") == "stretch"
        return {axis: size for axis, size in zip(axes, sizes.ravel(), strict=True) if stretched and size is not None}
    scales = op.value(2).const_value if op.has(2) else None
    if scales is None or scales.size != len(axes):
        return {}
    lengths: dict[int, Size | None] = {}
    for axis, scale in zip(axes, scales.numpy().ravel().astype(np.float32), strict=True):
        size = op.size(op.axes(0)[axis])
        if size.static is not None:
            lengths[axis] = Size.of(math.floor(np.float32(size.static) * scale))  # runtimes multiply in float32
        elif float(scale).is_integer():
            lengths[axis] = size * int(scale)
    return lengths


def _unscaled(op: Op, index: int) -> bool:
    """Whether the stored scales of batch and channels are 1, also if a Cast follows them."""
    value = op.value(index)
    producer = value.producer()
    while producer is not None and producer.op_type in ("Cast", "Identity") and producer.inputs[0] is not None:
        value = producer.inputs[0]
        producer = value.producer()
    tensor = value.const_value
    return tensor is not None and tensor.size >= 2 and bool((tensor.numpy().ravel()[:2] == 1.0).all())


@edits("Resize")
def edit_resize(op: GrownOp) -> None:
    """Sets the sizes of the axes that are not resized."""
    if op.has(3) and not op.has_attribute("axes"):
        op.resize_input(3, op.out_axes(0), keep=())
