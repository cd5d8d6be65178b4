"""Measures how much the outputs of a model change with its rounding, and allows the grown model such differences.

We run the source again with every weight and every floating-point input changed in its last place. In a recurrent
network, or in a model with very small probabilities, this changes outputs by much more than the rounding of the sums,
for which the plain tolerance is made. So the grown model may differ by a small multiple of the measured change, output
by output and element by element.
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
"""The number of runs of the source with other rounding."""

MULTIPLE = 4.0
"""The allowed difference, divided by the measured change of the source."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def perturbed(model: ir.Model, relative: float, trial: int, wide: bool = False) -> ir.Model:
    """A copy of a model whose weights are changed by this part, up or down; in float32 if `wide`."""
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
    """The same inputs. Floating-point inputs are changed in their last place."""
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
    """The report of one output, which also allows for the noise of the source.

    Args:
        report: the report of the output.
        want: the expected output, for each input set.
        got: the output of the grown model.
        moved: the expected output if the source is rounded differently, for each trial and input set.
        tolerance: the plain tolerance, which is added.
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
    """The allowed difference of each element, and the change of the source, divided by its largest element."""

    allowed: Array
    noise: float


def allowance(want: Array, moved: Sequence[Array], tolerance: float) -> Room:
    """The differences that the plain tolerance and the measured noise of the source allow."""
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
        # A single element may have changed little by chance.
        spread = noise + np.sqrt(np.mean(np.square(noise), axis=-1, keepdims=True))
    return Room(tolerance * largest + MULTIPLE * spread, float(noise.max(initial=0.0)) / (largest or 1.0))


def _integers_with_noise(
    report: OutputReport, want: Sequence[Array], got: Sequence[Array], moved: Sequence[Sequence[Array]]
) -> OutputReport:
    """Allow integers to differ where those of the source differ under other rounding."""
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
    """Whether the residue of the shared weights is small enough to measure noise."""
    return math.isfinite(residue) and residue < 0.01
