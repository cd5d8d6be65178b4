"""Any slice of a grown tensor, computed from the source tensor and a recipe alone.

The result of a slice does not depend on how the tensor is sliced: noise comes from a counter-based generator
(Philox) keyed by the seed, the tensor's name, the repeat and the block of rows.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.maps import AxisIndex, Indices, Maps, index_axis
from hyperclone_onnx.packing import pack, packed_width, unpack
from hyperclone_onnx.plan import Recipe
from hyperclone_onnx.strategies import Strategy

Array = npt.NDArray[Any]

_PRECISION = {ir.DataType.FLOAT16: (11, -24, 65504.0), ir.DataType.BFLOAT16: (8, -133, 3.3895e38)}
"""The bits of a significand, the exponent of the least number, and the largest one, of types in which rounding shares
would show."""

BLOCK = 1 << 18
"""Noise is drawn, and tensors are computed, in blocks of about this many elements."""


class GrownTensor:
    """The grown tensor that `recipe` makes from `source`, lazily.

    Args:
        source: the source tensor; read only in slices when it is memory-mapped.
        recipe: the axes and what is shared.
        maps: the source map of each named dimension.
        strategy: how shared dimensions divide the weight.
        dtype: the type to compute and return, by default the source's; float64 proves a plan exactly.
    """

    def __init__(
        self,
        source: ir.TensorProtocol,
        recipe: Recipe,
        maps: Maps,
        strategy: Strategy,
        dtype: ir.DataType | None = None,
    ) -> None:
        self.source = source
        self.recipe = recipe
        self.strategy = strategy
        self.dtype = dtype or source.dtype
        shared = set(recipe.shared)
        self.axes = tuple(
            index_axis([(factor, (a, f) in shared) for f, factor in enumerate(axis)], maps)
            for a, axis in enumerate(recipe.axes)
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The grown shape."""
        return tuple(axis.grown for axis in self.axes)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the file, which differs from `shape` where several numbers are packed in a byte."""
        if self.recipe.bits is None:
            return self.shape
        *rows, width = self.shape
        packed = (*rows, packed_width(width, self.recipe.bits))
        return packed if len(self.source.shape) == len(packed) else (math.prod(packed),)

    def stored(self) -> Array:
        """The whole tensor as it stands in the file, of shape `stored_shape`."""
        array = self.numpy()
        if self.recipe.bits is None:
            return array
        return pack(array, self.recipe.bits).reshape(self.stored_shape)

    @property
    def is_shared(self) -> bool:
        """Whether any repeats divide the weight among them."""
        return bool(self.recipe.shared)

    def numpy(self) -> Array:
        """The whole tensor."""
        out = np.empty(self.shape, dtype=self.dtype.numpy())
        for rows in self._row_blocks():
            out[rows] = self[(rows,)]
        return out if self.shape else self[()]

    def _row_blocks(self) -> Iterator[slice]:
        if not self.shape:
            return
        rows = max(1, BLOCK // max(1, math.prod(self.shape[1:])))
        for start in range(0, self.shape[0], rows):
            yield slice(start, min(start + rows, self.shape[0]))

    def __getitem__(self, windows: tuple[slice, ...]) -> Array:
        """A slice of the grown tensor: one slice with step 1 for each leading axis."""
        full = (*windows, *[slice(None)] * (len(self.axes) - len(windows)))
        axes = [axis[window] for axis, window in zip(self.axes, full, strict=True)]
        values = _take(self._values, [axis.source for axis in axes])
        if not self.is_shared and self.recipe.scale == 1.0:
            return np.asarray(values, dtype=self.dtype.numpy())
        if not self.dtype.is_floating_point():  # biases in units of a scale that shrinks: whole multiples
            return (values.astype(np.int64) * round(self.recipe.scale)).astype(self.dtype.numpy())
        work = np.float64 if self.dtype == ir.DataType.DOUBLE else np.float32
        result = np.asarray(values, dtype=work)
        if self.recipe.scale != 1.0:
            result = np.multiply(result, self.recipe.scale, dtype=work)
        if self.is_shared:
            result = self._shared(result, axes)
        return result.astype(self.dtype.numpy())

    @cached_property
    def _values(self) -> Array:
        array = self.source.numpy()
        if self.recipe.bits is None:
            return array
        return unpack(array, [axis.source_size for axis in self.axes], self.recipe.bits)

    # -- sharing ------------------------------------------------------------------------------------------

    def _shared(self, values: Array, axes: Sequence[AxisIndex]) -> Array:
        """Divide the repeats' values, window by window: within one the repeat's number is mostly one number."""
        result = np.empty_like(values)
        draws: dict[tuple[int, int, int], Array] = {}
        for window in itertools.product(*(_runs(axis) for axis in axes)):
            parts = [axis[each] for axis, each in zip(axes, window, strict=True)]
            result[window] = self._shared_window(values[window], parts, draws)
        return result

    def _shared_window(
        self, values: Array, axes: Sequence[AxisIndex], draws: dict[tuple[int, int, int], Array]
    ) -> Array:
        count = _one_if_constant(_outer(axes, "count", np.multiply))
        number = _one_if_constant(_mixed_radix([(axis.number, axis.count) for axis in axes]))
        if self.dtype not in _PRECISION or number.size > 1 or count.size > 1 or count.item() == 1:
            return self._share(values, axes, number, count, draws)
        # In few bits shares would not add up any more. Whole units in the last place of the weight do, as long as all
        # of them are near enough to it to have that unit; the last repeat takes what the others leave.
        unit, most = _unit(values, self.dtype)
        rest = np.rint(values / unit) * unit
        for repeat in range(int(number.item()) + 1):
            if repeat == count.item() - 1:
                return np.asarray(rest)
            share = self._share(values, axes, np.full_like(number, repeat), count, draws)
            share = np.clip(np.rint(share / unit) * unit, np.maximum(-most, rest - most), np.minimum(most, rest + most))
            rest = rest - share
        return np.asarray(share)

    def _share(
        self,
        values: Array,
        axes: Sequence[AxisIndex],
        number: Array,
        count: Array,
        draws: dict[tuple[int, int, int], Array],
    ) -> Array:
        """What the repeats of these numbers, out of `count`, take of the values."""
        if self.strategy.diagonal:
            other = _mixed_radix([(axis.other_number, axis.other_count) for axis in axes])
            values = values * (number == other % count)
            amplitude = 1.0 / np.sqrt(count)
        else:
            values = values / count.astype(values.dtype)
            amplitude = 1.0 / count
        if self.strategy.noisy and self._noise_scale > 0.0:
            noise = self._zero_sum_noise(axes, number, count, draws, values.dtype)
            spread = self._noise_scale * abs(self.recipe.scale) * math.sqrt(0.5)
            values = values + noise * (amplitude * spread).astype(values.dtype)
        return values

    @cached_property
    def _noise_scale(self) -> float:
        """The noise's standard deviation for a weight that is not divided: rms(W) * 10 ** (-snr / 20)."""
        total, flat = 0.0, self._values.reshape(-1)
        for start in range(0, flat.size, 1 << 20):
            part = np.asarray(flat[start : start + (1 << 20)], dtype=np.float64)
            total += float(np.dot(part, part))
        rms = math.sqrt(total / flat.size) if flat.size else 0.0
        return float(rms * 10.0 ** (-self.strategy.snr_db / 20.0))

    def _zero_sum_noise(
        self,
        axes: Sequence[AxisIndex],
        number: Array,
        count: Array,
        draws: dict[tuple[int, int, int], Array],
        dtype: Any,
    ) -> Array:
        """Noise of variance 2 that sums to zero over the repeats of each source index.

        Repeat r gets g_r - g_{r+1}, the last one wrapping to g_0, with g independent normal draws on the collapsed
        tensor; an index that is not repeated gets g_0 - g_0.
        """
        if number.size == 0 or any(axis.grown == 0 for axis in axes):
            return np.zeros([axis.grown for axis in axes], dtype=dtype)
        rows = axes[0].collapsed
        low, high = int(rows.min()), int(rows.max()) + 1
        where = [axis.collapsed - (low if i == 0 else 0) for i, axis in enumerate(axes)]

        def drawn(repeat: int) -> Array:
            key = (repeat, low, high)
            if key not in draws:
                draws[key] = self._draw(repeat, low, high)
            return _take(draws[key], where)

        following = np.where(number + 1 >= count, 0, number + 1)
        if number.size == following.size == 1:
            return np.subtract(drawn(int(number.item())), drawn(int(following.item())), dtype=dtype)
        noise = np.zeros([axis.grown for axis in axes], dtype=dtype)
        for repeat in sorted({*np.unique(number).tolist(), *np.unique(following).tolist()}):
            sign = (number == repeat).astype(np.int8) - (following == repeat).astype(np.int8)
            noise += drawn(repeat) * sign
        return noise

    def _draw(self, repeat: int, low: int, high: int) -> Array:
        """Rows [low, high) of the standard normal array of one repeat, on the collapsed tensor."""
        width = math.prod(axis.collapsed_size for axis in self.axes[1:])
        height = self.axes[0].collapsed_size
        rows = max(1, BLOCK // max(1, width))
        parts: list[Array] = []
        for block in range(low // rows, -(-high // rows)):
            size = (min((block + 1) * rows, height) - block * rows, width)
            generator = np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, repeat, block]))
            parts.append(generator.standard_normal(size, dtype=np.float32))
        first = (low // rows) * rows
        drawn = np.concatenate(parts)[low - first : high - first]
        return drawn.reshape(high - low, *[axis.collapsed_size for axis in self.axes[1:]])

    @cached_property
    def _key(self) -> list[int]:
        digest = hashlib.blake2b(self.recipe.source.encode(), digest_size=8).digest()
        return [int.from_bytes(digest, "little"), self.strategy.seed & (2**64 - 1)]

    def as_lazy(self, name: str) -> LazyGrownTensor:
        """This tensor for an ONNX graph; computed when it is written."""
        return LazyGrownTensor(self, name)


class LazyGrownTensor(ir.LazyTensor):
    """A grown tensor in an ONNX graph; `grown` answers slices of it."""

    def __init__(self, grown: GrownTensor, name: str) -> None:
        super().__init__(
            lambda: ir.Tensor(grown.stored(), dtype=grown.dtype, name=name),
            dtype=grown.dtype,
            shape=ir.Shape(grown.stored_shape),
            name=name,
        )
        self.grown = grown


def _unit(values: Array, dtype: ir.DataType) -> tuple[Array, Array]:
    """The unit in the last place of each value in a type of few bits, and the largest number that has it."""
    bits, least, most = _PRECISION[dtype]
    unit = np.ldexp(np.ones_like(values), np.maximum(np.frexp(values)[1] - bits, least))
    return unit, np.minimum(unit * (2.0**bits - 1.0), most).astype(values.dtype)


def _runs(axis: AxisIndex, most: int = 64) -> list[slice]:
    """Windows of an axis within which the repeat's number and count are constant; one window if they are many."""
    changes = np.flatnonzero((np.diff(axis.number) != 0) | (np.diff(axis.count) != 0)) + 1
    if len(changes) >= most:
        return [slice(0, axis.grown)]
    bounds = [0, *changes.tolist(), axis.grown]
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]


def _one_if_constant(array: Array) -> Array:
    """A single element in place of many equal ones; the rank stays."""
    if array.size == 0:
        return array
    first = array.reshape(-1)[0]
    return np.full((1,) * array.ndim, first) if (array == first).all() else array


def _outer(axes: Sequence[AxisIndex], name: str, combine: Any) -> Array:
    total: Array = np.ones((1,) * len(axes), dtype=np.int64)
    for i, axis in enumerate(axes):
        total = combine(total, getattr(axis, name).reshape([-1 if j == i else 1 for j in range(len(axes))]))
    return total


def _mixed_radix(digits: Sequence[tuple[Indices, Indices]]) -> Array:
    """The number whose digit on each axis is (number, base), the last axis the fastest."""
    rank = len(digits)
    total: Array = np.zeros((1,) * rank, dtype=np.int64)
    for i, (number, base) in enumerate(digits):
        shape = [-1 if j == i else 1 for j in range(rank)]
        total = total * base.reshape(shape) + number.reshape(shape)
    return total


def _take(values: Array, indices: Sequence[Indices]) -> Array:
    """values[np.ix_(*indices)], by slices where the indices are a run."""
    for axis, index in enumerate(indices):
        first, count = int(index[0]) if len(index) else 0, len(index)
        if count and np.array_equal(index, np.arange(first, first + count)):
            window = (slice(None),) * axis + (slice(first, first + count),)
            values = values[window]
        else:
            values = np.take(values, index, axis=axis)
    return values
