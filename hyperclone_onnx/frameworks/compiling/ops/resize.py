"""Resize: each axis is resized by itself. An element of the result is a weighted sum of a few elements of the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.frameworks.compiling.registry import Array, Host, implements

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Form:
    """The attributes that say where an element of the result lies in the input, and what is taken there."""

    coordinates: str
    mode: str
    nearest: str
    antialias: bool
    cubic: float
    exclude_outside: bool
    extrapolation: float


@implements("Resize")
def resize(
    xp: Any,
    x: Array,
    roi: Host | None = None,
    scales: Host | None = None,
    sizes: Host | None = None,
    *,
    antialias: int = 0,
    axes: tuple[int, ...] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
    opset: int,
) -> Array:
    """out[.., j, ..] = sum_k c[j, k] x[.., place[j, k], ..] along each axis"""
    if opset < 11:  # its only numbers are the scales
        return _resized(
            xp, x, list(range(x.ndim)), None, roi, None, _Form("asymmetric", mode, "floor", False, 0, False, 0)
        )
    form = _Form(
        coordinate_transformation_mode,
        mode,
        nearest_mode,
        bool(antialias),
        cubic_coeff_a,
        bool(exclude_outside),
        extrapolation_value,
    )
    along = [axis % x.ndim for axis in axes] if axes is not None else list(range(x.ndim))
    if sizes and keep_aspect_ratio_policy != "stretch":
        ratios = [size / x.shape[axis] for size, axis in zip(sizes, along, strict=True)]
        ratio = min(ratios) if keep_aspect_ratio_policy == "not_larger" else max(ratios)
        scales, sizes = (ratio,) * len(along), tuple(math.floor(ratio * x.shape[axis] + 0.5) for axis in along)
    return _resized(xp, x, along, roi or None, scales or None, sizes or None, form)


@implements("Upsample")
def upsample(xp: Any, x: Array, scales: Host, *, mode: str = "nearest") -> Array:
    """Resize of older opsets"""
    return _resized(
        xp, x, list(range(x.ndim)), None, scales, None, _Form("asymmetric", mode, "floor", False, 0, False, 0)
    )


def _resized(
    xp: Any,
    x: Array,
    axes: Sequence[int],
    roi: Sequence[float] | None,
    scales: Sequence[float] | None,
    sizes: Sequence[int] | None,
    form: _Form,
) -> Array:
    if form.mode not in ("nearest", "linear", "cubic"):
        raise Refused(f"Resize in the mode {form.mode!r} has no handoff")
    for number, axis in enumerate(axes):
        before = int(x.shape[axis])
        size = int(sizes[number]) if sizes is not None else math.floor(before * scales[number]) if scales else before
        scale = float(scales[number]) if scales else size / before
        region = (roi[number], roi[number + len(axes)]) if roi and form.coordinates == "tf_crop_and_resize" else None
        if size == before and scale == 1 and region is None:
            continue
        x = _along(xp, x, axis, *taps(before, size, scale, region, *astuple(form)), form.extrapolation)
    return x


Taps = tuple[tuple[tuple[int, ...], ...], tuple[tuple[float, ...], ...], tuple[bool, ...]]


def taps(before: int, size: int, scale: float, region: tuple[float, float] | None, *attributes: Any) -> Taps:
    """For each summand the place in the input and the coefficient of every element, and which elements lie outside.

    It takes and gives plain data, so that a framework that traces programs may call it and keep what it returns.
    """
    places, coefficients, outside = _taps(before, size, scale, region, _Form(*attributes))
    rows = tuple(map(tuple, places.T.tolist())), tuple(map(tuple, coefficients.T.tolist()))
    return *rows, tuple(outside.tolist())


def _taps(
    before: int, size: int, scale: float, region: tuple[float, float] | None, form: _Form
) -> tuple[Numbers, Numbers, Numbers]:
    at = _coordinates(before, size, scale, region, form.coordinates)
    outside = (at < 0) | (at > before - 1) if form.coordinates == "tf_crop_and_resize" else np.zeros(size, bool)
    if form.mode == "nearest":
        rounded = {
            "round_prefer_floor": lambda: np.ceil(at - 0.5),
            "round_prefer_ceil": lambda: np.floor(at + 0.5),
            "floor": lambda: np.floor(at),
            "ceil": lambda: np.ceil(at),
        }[form.nearest]()
        return np.clip(rounded, 0, before - 1).astype(np.int64)[:, None], np.ones((size, 1)), outside
    reach = 1 if form.mode == "linear" else 2
    shrinking = min(scale, 1.0) if form.antialias else 1.0
    wide = -(math.floor(-reach / shrinking) + 1)
    # The places around a coordinate begin left of it, also where the coordinate is a whole number.
    left = np.ceil(at) - 1
    places = left[:, None] + np.arange(-wide, wide + 2)
    coefficients = _weights((places - at[:, None]) * shrinking, form)
    if form.exclude_outside:
        coefficients = np.where((places < 0) | (places >= before), 0.0, coefficients)
    if form.exclude_outside or form.antialias:
        coefficients = coefficients / coefficients.sum(axis=1, keepdims=True)
    return np.clip(places, 0, before - 1).astype(np.int64), coefficients, outside


def _coordinates(
    before: int, size: int, scale: float, region: tuple[float, float] | None, transformation: str
) -> Numbers:
    """The place in the input of each element of the result."""
    j = np.arange(size, dtype=np.float64)
    # The length may be a fraction, where scales are given.
    length = scale * before
    match transformation:
        case "align_corners":
            return j * (before - 1) / (length - 1) if length != 1 else np.zeros(size)
        case "asymmetric":
            return j / scale
        case "half_pixel" | "half_pixel_symmetric" | "pytorch_half_pixel":
            if transformation == "pytorch_half_pixel" and length == 1:
                return np.full(size, -0.5)
            shift = before / 2 * (1 - size / length) if transformation == "half_pixel_symmetric" else 0.0
            return shift + (j + 0.5) / scale - 0.5
        case "tf_crop_and_resize":
            start, end = region or (0.0, 1.0)
            if size == 1:
                return np.full(1, 0.5 * (start + end) * (before - 1))
            return start * (before - 1) + j * (end - start) * (before - 1) / (length - 1)
    raise Refused(f"Resize with the coordinates {transformation!r} has no handoff")


def _weights(distance: Numbers, form: _Form) -> Numbers:
    """The coefficient of a place at a distance."""
    far = np.abs(distance)
    if form.mode == "linear":
        return np.asarray(np.clip(1 - far, 0, 1))
    a = form.cubic
    near = ((a + 2) * far - (a + 3)) * far * far + 1
    beyond = ((a * far - 5 * a) * far + 8 * a) * far - 4 * a
    return np.asarray(np.where(far <= 1, near, np.where(far < 2, beyond, 0.0)))


def _along(
    xp: Any,
    x: Array,
    axis: int,
    places: tuple[tuple[int, ...], ...],
    coefficients: tuple[tuple[float, ...], ...],
    outside: tuple[bool, ...],
    extrapolation: float,
) -> Array:
    """The sum over the places of one axis."""
    device, shape = xp.device_of(x), [-1 if i == axis else 1 for i in range(x.ndim)]
    total = None
    for place, coefficient in zip(places, coefficients, strict=True):
        part = xp.take(x, xp.lift(place, 7, device), axis=axis)
        if any(number != 1 for number in coefficient):
            part = part * xp.astype(xp.reshape(xp.lift(coefficient, 11, device), shape), x.dtype)
        total = part if total is None else total + part
    if any(outside):
        total = xp.where(xp.reshape(xp.lift(outside, 9, device), shape), xp.full_like(total, extrapolation), total)
    return total
