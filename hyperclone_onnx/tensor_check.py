"""Is every grown tensor right? Its repeats are added up, from the file, and compared with the source tensor.

One weight that is off by a part in a thousand stands out here, however little it moves an output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel
from hyperclone_onnx.grown_tensor import GrownTensor
from hyperclone_onnx.maps import AxisIndex
from hyperclone_onnx.plan import Plan

Array = npt.NDArray[Any]


@dataclass
class TensorReport:
    """How the grown tensors compare with their sources."""

    checked: int = 0
    residue: float = 0.0
    """Root mean square over tensors of: rms(sum of repeats - source) / rms(source). Rounding leaves it."""
    worst: str = ""
    worst_error: float = 0.0
    """The largest error in units of its rounding bound; above 1 the tensor is wrong."""
    wrong: list[str] = field(default_factory=list)


def check_tensors(source: ir.Model, grown: ir.Model, plan: Plan) -> TensorReport:
    """Add up the repeats of every grown tensor and compare with the source; other tensors must be unchanged.

    Raises:
        BadModel: a tensor that the plan names is missing.
    """
    report = TensorReport()
    squares: list[float] = []
    for name, recipe in plan.tensors.items():
        made = GrownTensor(_stored(source, recipe.source), recipe, plan.maps, plan.strategy)
        error, bound, relative = _tensor_error(made, _stored(grown, name))
        report.checked += 1
        if made.is_shared:
            squares.append(relative**2)
        excess = error / bound if bound else (math.inf if error else 0.0)
        if not excess <= report.worst_error:
            report.worst, report.worst_error = name, excess
        if not excess <= 1.0:
            report.wrong.append(f"{name}: the repeats differ from the source by {error:.1e} (rounding: {bound:.1e})")
    report.residue = math.sqrt(sum(squares) / len(squares)) if squares else 0.0
    for name, value in source.graph.initializers.items():
        if name in plan.tensors or name not in grown.graph.initializers or value.const_value is None:
            continue
        report.checked += 1
        if not _identical(value.const_value, _stored(grown, name)):
            report.wrong.append(f"{name}: it should be the source's own and differs")
    return report


def _stored(model: ir.Model, name: str) -> ir.TensorProtocol:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise BadModel(f"the model has no tensor {name!r}, which the plan names: it was not grown by this plan")
    return value.const_value


def _identical(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(_bytes(a), _bytes(b))


def _bytes(tensor: ir.TensorProtocol) -> Array:
    array = np.ascontiguousarray(tensor.numpy())
    return array.reshape(-1).view(np.uint8)


def _tensor_error(made: GrownTensor, stored: ir.TensorProtocol) -> tuple[float, float, float]:
    """(largest error of a sum of repeats, its rounding bound, rms error relative to the source's rms)."""
    if tuple(stored.shape.numpy()) != made.stored_shape or stored.dtype != made.dtype:
        return math.inf, 0.0, math.inf
    array = stored.numpy()
    if not made.dtype.is_floating_point():
        return (0.0 if np.array_equal(array, made.stored()) else math.inf), 0.0, 0.0
    eps = 2.0**-7 if made.dtype == ir.DataType.BFLOAT16 else float(np.finfo(made.dtype.numpy()).eps)
    if not made.is_shared:
        return _copy_error(made, array, eps)
    worst, largest, total, power, count = 0.0, 0.0, 0.0, 0.0, 0
    for got, want, peak in _collapsed(made, array):
        error = np.abs(got - want)
        worst, largest = max(worst, _largest(error)), max(largest, peak)
        total, power, count = total + float((error**2).sum()), power + float((want**2).sum()), count + error.size
    repeats = max(int(np.prod([axis.count.max() for axis in made.axes])), 1)
    relative = math.sqrt(total / power) if power else 0.0
    return worst, repeats * eps * largest, relative


def _largest(error: Array) -> float:
    """The largest error; infinite where one is not a number."""
    return float(np.nan_to_num(error, nan=math.inf).max()) if error.size else 0.0


def _copy_error(made: GrownTensor, array: Array, eps: float) -> tuple[float, float, float]:
    worst = 0.0
    for rows in _rows(made):
        want = np.asarray(made[rows], dtype=np.float64)
        got = np.asarray(array[rows], dtype=np.float64)
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        if not same.all():
            worst = max(worst, float(np.nan_to_num(np.abs(got - want), nan=math.inf).max()))
    return worst, 0.0, 0.0


def _rows(made: GrownTensor) -> Iterator[tuple[slice, ...]]:
    if not made.shape:
        yield ()
        return
    step = max(1, (1 << 20) // max(1, math.prod(made.shape[1:])))
    for start in range(0, made.shape[0], step):
        yield (slice(start, start + step),)


def _collapsed(made: GrownTensor, array: Array) -> Iterator[tuple[Array, Array, float]]:
    """(sum of repeats, source, largest stored magnitude), over blocks of the collapsed tensor's first axis."""
    first = made.axes[0]
    order = np.argsort(first.collapsed, kind="stable")
    sorted_rows = first.collapsed[order]
    source = made.source.numpy()
    step = max(1, (1 << 20) // max(1, math.prod(made.shape[1:])))
    for low in range(0, first.collapsed_size, step):
        high = min(low + step, first.collapsed_size)
        start, end = np.searchsorted(sorted_rows, [low, high])
        rows = order[start:end]
        block = np.asarray(array[rows], dtype=np.float64)
        peak = float(np.abs(block).max()) if block.size else 0.0
        total = np.zeros((high - low, *block.shape[1:]))
        np.add.at(total, first.collapsed[rows] - low, block)
        for axis, index in enumerate(made.axes[1:], 1):
            total = _add_up(total, axis, index)
        want = np.asarray(source[_sources(first)[low:high]], dtype=np.float64)
        for axis, index in enumerate(made.axes[1:], 1):
            want = np.take(want, _sources(index), axis=axis)
        yield total, want * made.recipe.scale, peak


def _add_up(array: Array, axis: int, index: AxisIndex) -> Array:
    if index.collapsed_size == index.grown:
        return array
    moved = np.moveaxis(array, axis, 0)
    total = np.zeros((index.collapsed_size, *moved.shape[1:]))
    np.add.at(total, index.collapsed, moved)
    return np.moveaxis(total, 0, axis)


def _sources(index: AxisIndex) -> Array:
    """The source index of each collapsed index."""
    source = np.empty(index.collapsed_size, dtype=np.int64)
    source[index.collapsed] = index.source
    return source
