"""How far a model moves by itself when its rounding changes: what differs by no more than that is no difference.

The source is run once more with every weight and every floating-point input off by its last place. In a recurrent net,
or a model that ends in very small probabilities, that moves outputs by far more than the rounding of the sums alone,
which the plain tolerance knows; so the grown model may be off by a small multiple of what was measured, output by
output and element by element.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.validation.inputs.cases import Feeds
from hyperclone_onnx.validation.outputs import NOT_IDENTICAL, OutputReport

Array = npt.NDArray[Any]

TRIALS = 3
"""How often the source is run with other rounding."""

MULTIPLE = 4.0
"""How many times its own noise a model may be off."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def perturbed(model: ir.Model, relative: float, trial: int, wide: bool = False) -> ir.Model:
    """A copy of a model whose weights are off by a part of themselves, up or down; `wide` with them in float32."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _FLOATS and tensor.size > 1:
            narrow = wide and tensor.dtype != ir.DataType.DOUBLE
            value.const_value = _off(tensor, relative, trial, ir.DataType.FLOAT if narrow else tensor.dtype)
            value.type = ir.TensorType(value.const_value.dtype)
    return copy


def _off(tensor: ir.TensorProtocol, relative: float, trial: int, dtype: ir.DataType) -> ir.TensorProtocol:
    name = tensor.name or ""

    def make() -> ir.TensorProtocol:
        rng = np.random.default_rng([trial, zlib.crc32(name.encode())])
        return ir.Tensor(_shifted(np.asarray(tensor.numpy()), relative, rng).astype(dtype.numpy()), name=name)

    return ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)


def perturbed_feeds(feeds: Feeds, trial: int) -> Feeds:
    """The same inputs, the floating-point ones off by their last place."""
    rng = np.random.default_rng([trial])
    return {
        name: _shifted(array, float(np.finfo(array.dtype).eps), rng).astype(array.dtype)
        if array.dtype.kind == "f"
        else array
        for name, array in feeds.items()
    }


def _shifted(array: Array, relative: float, rng: np.random.Generator) -> Array:
    signs = rng.integers(0, 2, array.shape, dtype=np.int8).astype(np.float32) * 2 - 1
    wide = np.asarray(array, dtype=np.float64 if array.dtype == np.float64 else np.float32)
    return np.asarray(wide * (1 + signs.astype(wide.dtype) * wide.dtype.type(relative)))


def with_noise(
    report: OutputReport,
    want: Sequence[Array],
    got: Sequence[Array],
    moved: Sequence[Sequence[Array]],
    tolerance: float,
) -> OutputReport:
    """The report of one output, judged by the noise of the source as well.

    Args:
        report: of the output.
        want: what the grown model should give, for each input set.
        got: what it gave.
        moved: what it should give had the source been rounded otherwise, for each trial and input set.
        tolerance: what is allowed besides.
    """
    if report.problem.startswith("shape ") and any(
        one.shape != trial[number].shape for number, one in enumerate(want) for trial in moved
    ):
        return replace(report, problem="", note="its length changes with the rounding of the source itself")
    if want and want[0].dtype.kind in "iub":
        return _integers_with_noise(report, want, got, moved)
    if report.problem:
        return report
    noise = excess = 0.0
    for number, (one, other) in enumerate(zip(want, got, strict=True)):
        room = allowance(one, [trial[number] for trial in moved], tolerance)
        a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.any():
            continue
        error = np.abs(a - b)[finite]
        noise = max(noise, room.noise)
        excess = max(excess, float((error / np.maximum(room.allowed[finite], np.finfo(np.float64).tiny)).max()))
    return replace(report, noise=noise, excess=excess, note=_note(noise) if excess <= 1.0 else "")


def _note(noise: float) -> str:
    return f"the source itself moves by {noise:.1e} when its weights are off by their last place"


@dataclass(frozen=True)
class Room:
    """How far each element may be off, and how far the source moves, as a part of its largest element."""

    allowed: Array
    noise: float


def allowance(want: Array, moved: Sequence[Array], tolerance: float) -> Room:
    """What the plain tolerance and some trials of the source's noise allow."""
    a = np.asarray(want, dtype=np.float64)
    finite = np.isfinite(a)
    largest = float(np.abs(a[finite]).max(initial=0.0))
    noise = np.zeros(a.shape)
    for trial in moved:
        other = np.asarray(trial, dtype=np.float64)
        if other.shape == a.shape:
            with np.errstate(invalid="ignore"):
                noise = np.maximum(noise, np.where(finite & np.isfinite(other), np.abs(other - a), 0.0))
    spread = noise
    if a.ndim and a.shape[-1] > 1:
        # One element may have moved by little only by chance.
        spread = noise + np.sqrt(np.mean(np.square(noise), axis=-1, keepdims=True))
    return Room(tolerance * largest + MULTIPLE * spread, float(noise.max(initial=0.0)) / (largest or 1.0))


def _integers_with_noise(
    report: OutputReport, want: Sequence[Array], got: Sequence[Array], moved: Sequence[Sequence[Array]]
) -> OutputReport:
    """Integers may differ where the source's own differ under other rounding."""
    if report.problem and report.problem != NOT_IDENTICAL:
        return report
    count = total = 0
    for number, (one, other) in enumerate(zip(want, got, strict=True)):
        differ = one != other
        flips = np.zeros(one.shape, dtype=bool)
        for trial in moved:
            if trial[number].shape == one.shape:
                flips |= trial[number] != one
        if (differ & ~flips).any():
            return report
        count, total = count + int(differ.sum()), total + one.size
    return replace(
        report, problem="", note=f"{count} of {total} integers differ, where the source's own change with its rounding"
    )


def measurable(residue: float) -> bool:
    """Whether the residue of the shared weights is such that noise can be measured against it."""
    return math.isfinite(residue) and residue < 0.01
