"""Scales the gains of norms over a dimension that becomes smaller.

A norm divides by the root of a mean of squares over its axis. If the indices that are kept are smaller or larger than
all of them, that root changes, and with it all that comes out of the norm. The gain takes the quotient of the two:
sqrt(mean of squares of what is kept / mean of squares of all), measured on inputs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.analysis.analysing import Analysis
from hyperclone_onnx.graphs import MOVES_OR_CASTS, is_initializer
from hyperclone_onnx.plan.maps import index_axis
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.planning.request import Growth
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.shrinking.sampling import sample
from hyperclone_onnx.validation.inputs.search import Wishes
from hyperclone_onnx.validation.sessions import Device

Array = npt.NDArray[Any]

FUSED = {
    "LayerNormalization": 1,
    "RMSNormalization": 1,
    "SimplifiedLayerNormalization": 1,
    "SkipLayerNormalization": 2,
    "SkipSimplifiedLayerNormalization": 2,
}
"""Norms that are one operator, and the input that is their gain."""

CENTRED = {"LayerNormalization", "SkipLayerNormalization"}
"""Norms that subtract the mean first."""

ELEMENTWISE = {"Add", "Sub", "Sqrt", "Reciprocal", "Pow", "Div", "Mul", "Cast"}
"""Operators between an average and the value that it normalises."""

FARTHEST = 12
"""The most nodes between an average and its gain."""


@dataclass(frozen=True)
class Norm:
    """A norm over an axis that becomes smaller.

    Args:
        values: what it normalises is the sum of these.
        axis: the axis of the values, from the end.
        gain: the name of the stored gain.
        centred: whether the mean is subtracted first.
        squared: whether the values are squares already.
    """

    values: tuple[ir.Value, ...]
    axis: int
    gain: str
    centred: bool
    squared: bool


def norms_of(growth: Growth) -> tuple[list[Norm], int]:
    """The norms over axes that become smaller and have a stored gain, and the number of those that have none."""
    dimensions, terms = growth.dimensions, growth.terms
    norms: list[Norm] = []
    without = 0
    for average in dimensions.uniform:
        if not terms.grows(average.term) or terms.factors(average.term) is None:
            continue
        norm = _fused(dimensions, average.node) if average.node.op_type in FUSED else None
        if average.node.op_type == "ReduceMean":
            if not _averages_squares(average.node):
                continue
            norm = _written(growth, average.node)
        if norm is None:
            without += 1
        else:
            norms.append(norm)
    return norms, without


def _fused(dimensions: Dimensions, node: ir.Node) -> Norm | None:
    slot = FUSED[node.op_type]
    gain = node.inputs[slot] if slot < len(node.inputs) else None
    values = tuple(value for value in node.inputs[:slot] if value is not None)
    if gain is None or not is_initializer(gain):
        return None
    return Norm(values, -1, gain.name or "", node.op_type in CENTRED, False)


def _averages_squares(node: ir.Node) -> bool:
    read = node.inputs[0]
    producer = None if read is None else read.producer()
    while producer is not None and producer.op_type == "Cast":
        read = producer.inputs[0]
        producer = None if read is None else read.producer()
    if producer is None:
        return False
    return producer.op_type == "Pow" or (producer.op_type == "Mul" and producer.inputs[0] is producer.inputs[1])


def _written(growth: Growth, node: ir.Node) -> Norm | None:
    """A norm that is written in simple operators: its average of squares, and the stored gain behind it."""
    dimensions, terms = growth.dimensions, growth.terms
    read = node.inputs[0]
    axes = None if read is None else dimensions.axes.get(read)
    if read is None or axes is None:
        return None
    axis = next((number - len(axes) for number, term in enumerate(axes) if terms.grows(term)), None)
    if axis is None:
        return None
    front = [node.outputs[0]]
    for _ in range(FARTHEST):
        following: list[ir.Value] = []
        for value in front:
            for use in value.uses():
                if use.node.op_type not in ELEMENTWISE or use.node.domain:
                    continue
                other = use.node.inputs[1 - use.idx] if len(use.node.inputs) == 2 else None
                stored = None if other is None else _stored(other)
                reached = _is_wide(growth, value)
                if reached and use.node.op_type == "Mul" and stored is not None and _is_wide(growth, stored):
                    return Norm((read,), axis, stored.name or "", False, True)
                following.append(use.node.outputs[0])
        front = list(dict.fromkeys(following))
    return None


def _is_wide(growth: Growth, value: ir.Value) -> bool:
    """Whether a value, or a stored tensor, has an axis that becomes smaller."""
    dimensions = growth.dimensions
    axes = dimensions.axes.get(value)
    if axes is None:
        uses = ((use.node, use.idx) for use in value.uses())
        axes = next((dimensions.use_axes[use] for use in uses if use in dimensions.use_axes), None)
    return any(growth.terms.grows(term) for term in axes or ())


def _stored(value: ir.Value) -> ir.Value | None:
    """The stored tensor that a value is, but for its type and its shape."""
    for _ in range(FARTHEST):
        if is_initializer(value):
            return value
        producer = value.producer()
        if producer is None or producer.op_type not in MOVES_OR_CASTS or not producer.inputs:
            return None
        read = producer.inputs[0]
        if read is None:
            return None
        value = read
    return None


def gain_scales(
    analysis: Analysis, growth: Growth, norms: Sequence[Norm], wishes: Wishes, device: Device
) -> dict[str, float]:
    """The number that multiplies each gain. Norms that share a gain share the geometric mean."""
    squares: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    values = list(dict.fromkeys(value for norm in norms for value in norm.values))
    pending: dict[int, list[Array]] = defaultdict(list)
    for value, array in sample(analysis, [one for one in values if not is_initializer(one)], wishes, device):
        for number, norm in enumerate(norms):
            if value not in norm.values:
                continue
            pending[number].append(array)
            if len(pending[number]) < sum(not is_initializer(one) for one in norm.values):
                continue
            parts, kept = pending.pop(number), _kept(growth, norm)
            if kept is None or len({part.shape for part in parts}) > 1:
                continue
            total = np.sum(parts, axis=0)
            for place, numbers in enumerate((np.take(total, kept, axis=norm.axis), total)):
                if norm.squared:
                    squares[number][place] += float(numbers.mean())
                    continue
                centre = numbers.mean(axis=norm.axis, keepdims=True) if norm.centred else 0.0
                squares[number][place] += float(((numbers - centre) ** 2).mean())
    logs: dict[str, list[float]] = defaultdict(list)
    for number, (kept_square, whole_square) in squares.items():
        if kept_square > 0.0 and whole_square > 0.0 and math.isfinite(kept_square) and math.isfinite(whole_square):
            logs[norms[number].gain].append(0.5 * math.log(kept_square / whole_square))
    return {name: math.exp(sum(parts) / len(parts)) for name, parts in logs.items()}


def _kept(growth: Growth, norm: Norm) -> Array | None:
    """The indices of the normalised axis that are kept."""
    for value in norm.values:
        axes = growth.dimensions.axes.get(value)
        if axes is not None:
            factors = growth.terms.factors(axes[len(axes) + norm.axis])
            return None if factors is None else index_axis([(one, False) for one in factors], growth.terms.maps).source
    return None


def with_scales(plan: Plan, scales: Mapping[str, float]) -> Plan:
    """The plan, with gains multiplied by numbers."""
    tensors = dict(plan.tensors)
    for name, recipe in plan.tensors.items():
        if len(recipe.sources) == 1 and recipe.source in scales:
            tensors[name] = replace(recipe, scale=recipe.scale * scales[recipe.source])
    return replace(plan, tensors=tensors)
