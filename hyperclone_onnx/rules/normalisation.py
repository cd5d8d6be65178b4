"""Normalisations and softmax."""

from __future__ import annotations

from hyperclone_onnx.algebra.dims import ONE
from hyperclone_onnx.rules.dimensions import Fact, Uniform
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import edits, relates


@relates("LayerNormalization", "RMSNormalization")
def layer_norm(op: Op) -> None:
    """Y = (X - mean X) / sqrt(var X + eps) * scale + B, over the axes from `axis` on (RMS: without the mean)"""
    axes = op.axes(0)
    axis = op.axis(op.integer("axis", -1), len(axes))
    for term in axes[axis:]:
        op.uniform(term)
    op.out(op.broadcast([axes, *(op.axes(i) for i in range(1, op.count) if op.has(i))]))
    for index in range(1, len(op.node.outputs)):
        op.out((*axes[:axis], *[ONE] * (len(axes) - axis)), index=index)


@relates("GroupNormalization")
def group_norm(op: Op) -> None:
    """Y[n, (g c), p] is X normalised over c and p for each group g, times scale, plus bias"""
    axes = op.axes(0, least=2)
    groups, size = op.positive("num_groups"), op.static(axes[1])
    if size is None or size % groups:
        raise CannotTell("a number of channels that is not a multiple of the number of groups")
    group, channels = op.dim(groups), op.dim(size // groups)
    op.space.match([axes[1]], [group, channels])
    op.fact(Fact.GROUPED, group)
    for term in (channels, *axes[2:]):
        op.uniform(term)
    for index in (1, 2):
        op.unify(op.axis_of(index, 0), axes[1] if op.opset >= 21 else group)
    op.out(axes)


@edits("GroupNormalization")
def edit_group_norm(op: GrownOp) -> None:
    """Sets the number of groups: it grows by the part of the channels' growth that is outside a group."""
    groups, channels = op.positive("num_groups"), op.axis_of(0, 1)
    if any(atom.tied for atom in op.space.atoms(channels)):
        return  # each channel is repeated in place, so that the groups keep their number
    grown = op.grown(op.factored(channels, (op.static(channels) or 0) // groups)[0])
    if grown != groups:
        op.set_attribute("num_groups", grown)


@relates("MeanVarianceNormalization")
def mean_variance_norm(op: Op) -> None:
    """Y = (X - mean X) / sqrt(var X) over `axes`"""
    axes = op.axes(0)
    for axis in op.int_list("axes", None) or [0, 2, 3]:
        op.uniform(axes[op.axis(axis, len(axes))])
    op.out(axes)


@relates("Softmax", "LogSoftmax", "Hardmax")
def softmax(op: Op) -> None:
    """out[j] = exp x[j] / sum_k exp x[k]: n repeats change the sum, so the axis stays, or out is multiplied by n"""
    axes = op.axes(0)
    axis = op.axis(op.integer("axis", -1 if op.opset >= 13 else 1), len(axes))
    for position in range(axis, len(axes) if op.opset < 13 else axis + 1):
        op.fact(Fact.SOFTMAX, axes[position])
        if op.node in op.dimensions.gates:
            op.dimensions.uniform.append(Uniform(op.node, axes[position]))
            op.sum_over((0, position), power=-1.0, output_only=True)
        else:
            op.pin(axes[position], f"{op.node.op_type} runs over it")
    op.out(axes)


@relates("LpNormalization")
def lp_normalisation(op: Op) -> None:
    """Y[.., j, ..] = X[.., j, ..] / (sum_k |X[.., k, ..]|^p)^(1/p): n repeats make Y n^(1/p) times smaller"""
    axes, p = op.axes(0), op.integer("p", 2)
    if p not in (1, 2):
        raise op.malformed(f"attribute p is {p}, and must be 1 or 2")
    axis = op.axis(op.integer("axis", -1), len(axes))
    op.uniform(axes[axis])
    op.sum_over((0, axis), power=-1.0 / p, output_only=True)
    op.out(axes)
