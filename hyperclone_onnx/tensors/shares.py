"""Divides the values of a weight among their repeats.

The shares are computed on the collapsed tensor, in which each shared index stands once. All computation is elementwise.
So a share does not depend on the window in which it is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.plan.maps import AxisIndex, Indices
from hyperclone_onnx.plan.strategies import Strategy
from hyperclone_onnx.tensors.noise import draw, key_of, quantiles
from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.tensors.stretches import Pick, Run, one_if_constant, stretches

Array = npt.NDArray[Any]
Number = Indices | int

EVERY = slice(None)

PRECISION = {ir.DataType.FLOAT16: (11, -24, 65504.0), ir.DataType.BFLOAT16: (8, -133, 3.3895e38)}
"""(bits of the significand, exponent of the smallest positive number, largest number) of the types that are coarse.

In these types, shares that are rounded one by one would not add up to the weight.
"""


class Columns:
    """The columns of a window of the grown tensor, and the columns of the collapsed tensor from which they come.

    Args:
        axis: the columns of the window.
        whole: all columns of the grown tensor, where the window does not have them all.
    """

    def __init__(self, axis: AxisIndex, whole: AxisIndex | None = None) -> None:
        collapsed, first, place = _unique(axis.collapsed)
        self.width = axis.collapsed_size if whole is None else whole.collapsed_size
        """The number of columns of the whole collapsed tensor."""
        self.grown = axis.grown
        self.collapsed = collapsed
        self.low = int(collapsed[0]) if len(collapsed) else 0
        self.high = int(collapsed[-1]) + 1 if len(collapsed) else 0
        source = axis.source[first]
        self.first_source = int(source.min()) if len(source) else 0
        self.sources = int(source.max()) + 1 - self.first_source if len(source) else 0
        self.pick = Pick(source - self.first_source)
        """Picks the collapsed columns from the columns of the source that begin at `first_source`."""
        self.drawn = Pick(collapsed - self.low)
        self.stretch = None if axis.stretch is None else axis.stretch[first]
        """The factor of each collapsed column; None where all are 1."""
        self.count = one_if_constant(axis.count[first])
        self.other_number = one_if_constant(axis.other_number[first])
        self.other_count = one_if_constant(axis.other_count[first])
        self.parts = _with_windows(_parts(axis, place), collapsed)
        """The columns of the window, divided by the repeat that fills them."""
        self.direct = len(self.parts) == 1 and len(collapsed) == axis.grown and bool((np.diff(place) == 1).all())
        """Whether the columns of the window are the collapsed columns, in the same order."""

    @property
    def size(self) -> int:
        """The number of collapsed columns."""
        return len(self.collapsed)


def _unique(index: Indices) -> tuple[Indices, slice | Indices, Indices]:
    """`numpy.unique` of an index vector: (its values in order, where each stands first, the number of each element)."""
    if len(index) and bool((np.diff(index) == 1).all()):  # the usual case; it needs no sorting
        return index, slice(None), index - index[0]
    collapsed, first, place = np.unique(index, return_index=True, return_inverse=True)
    return collapsed, first, place.reshape(-1)


@dataclass(frozen=True)
class Part:
    """The columns of a window that one repeat of their source index fills."""

    number: int
    """The number of the repeat, from 0."""
    count: int
    """The number of repeats."""
    columns: slice | Indices
    """The columns that are filled."""
    taken: Pick
    """The collapsed columns that fill them."""
    window: slice | None = None
    """The collapsed columns as a window, where both kinds of columns follow one another and others do not belong."""


def _parts(axis: AxisIndex, place: Indices) -> list[Part]:
    if axis.grown == 0:
        return []
    number, count = one_if_constant(axis.number), one_if_constant(axis.count)
    if isinstance(number, int) and isinstance(count, int):
        return [Part(number, count, slice(0, axis.grown), Pick(place))]
    labels = axis.count * (int(axis.number.max()) + 1) + axis.number
    parts: list[Part] = []
    for label in np.unique(labels):
        columns = np.flatnonzero(labels == label)
        number, count = int(axis.number[columns[0]]), int(axis.count[columns[0]])
        contiguous = int(columns[-1]) - int(columns[0]) + 1 == len(columns)
        where = slice(int(columns[0]), int(columns[-1]) + 1) if contiguous else columns
        parts.append(Part(number, count, where, Pick(place[columns])))
    return parts


def _with_windows(parts: list[Part], collapsed: Indices) -> list[Part]:
    """Parts of one axis. Where indices are repeated unequally in turn, each part is computed by itself."""
    if len(parts) < 2 or not bool((np.diff(collapsed) == 1).all()):
        return parts
    windows = [_window(part, len(collapsed)) for part in parts]
    return [replace(part, window=window) for part, window in zip(parts, windows, strict=True)]


def _window(part: Part, columns: int) -> slice | None:
    taken = part.taken.index
    if not isinstance(part.columns, slice) or not part.taken.whole or len(taken) == columns:
        return None
    return slice(int(taken[0]), int(taken[-1]) + 1)


class Sharer:
    """Knows how one weight is divided among repeats.

    Args:
        strategy: the strategy whose law divides the weight.
        dtype: the type in which the shares are stored.
        tensor: the name of the tensor, by which its noise is drawn.
        spread: the standard deviation of the noise on a weight that is not divided; 0 for no noise.
    """

    def __init__(self, strategy: Strategy, dtype: ir.DataType, tensor: str, spread: float) -> None:
        self.strategy = strategy
        self.law = strategy.law
        self.spread = spread if self.law.noisy else 0.0
        self.noisy = self.spread > 0.0
        self.tensor = tensor
        self.bits = PRECISION.get(dtype)
        self.work = np.float64 if dtype == ir.DataType.DOUBLE else np.float32
        self._tables: dict[int, Array] = {}

    @property
    def all_alike(self) -> bool:
        """Whether all repeats get the same numbers."""
        return not self.noisy and self.law.shares_equally and self.bits is None

    def table(self, count: int) -> Array:
        """The table of quantiles from which the noise of `count` repeats is drawn, scaled to its final size."""
        if count not in self._tables:
            amplitude = self.law.noise_scale(count)
            amplitude *= self.spread * (1.0 if count == 2 else math.sqrt(0.5))
            self._tables[count] = np.multiply(quantiles(), self.work(amplitude), dtype=self.work)
        return self._tables[count]


@dataclass(frozen=True)
class _Noise:
    """The noise of one repeat: `values`, or their negatives."""

    values: Array
    negative: bool = False

    def part(self, columns: slice) -> _Noise:
        return _Noise(self.values[:, columns], self.negative)

    def add_to(self, numbers: Array, out: Array) -> None:
        (np.subtract if self.negative else np.add)(numbers, self.values, out=out)


class Block:
    """A block of rows of the collapsed tensor, whose values are divided among repeats on demand.

    Args:
        sharer: says how the values are divided.
        values: shape (rows, collapsed columns), in the working type of `sharer`. They are not changed.
        columns: the columns of the values.
        scratch: holds the working arrays.
    """

    def __init__(self, sharer: Sharer, values: Array, columns: Columns, scratch: Scratch) -> None:
        self.sharer, self.values, self.columns, self.scratch = sharer, values, columns, scratch
        self._draws: dict[tuple[Any, ...], Array] = {}
        self._rounded: dict[int, list[Array]] = {}
        self._quotient: tuple[tuple[Any, Any], Number, Array] | None = None

    def fill(self, row: Run, out: Array) -> None:
        """Write the grown columns of the rows that `row` repeats into `out`, shape (rows, grown columns)."""
        columns = self.columns
        for part in columns.parts:
            number = row.number * part.count + part.number
            if part.window is not None and self.sharer.bits is None:
                self._exact_share(row, number, out[:, part.columns], part.window, row.count * part.count)
            elif columns.direct:
                self.share(row, number, out)
            elif isinstance(part.columns, slice) and part.taken.whole and len(part.taken.index) == columns.size:
                self.share(row, number, out[:, part.columns])
            else:
                share = self.scratch.array("share", self.values.shape, self.values.dtype)
                self.share(row, number, share)
                if isinstance(part.columns, slice):
                    part.taken.into(share, out[:, part.columns])
                else:
                    out[:, part.columns] = share[:, part.taken.index]

    def share(self, row: Run, number: int, out: Array) -> None:
        """Write the share of repeat `number` into `out`, shape (rows, collapsed columns)."""
        if self.sharer.bits is not None:
            out[...] = self._rounded_shares(row)[number]
        else:
            self._exact_share(row, number, out)

    def _exact_share(
        self, row: Run, number: int, out: Array, window: slice = EVERY, counted: int | None = None
    ) -> None:
        """The share of repeat `number` in the working type, not rounded to the stored type.

        Args:
            row: the rows.
            number: the number of the repeat.
            out: receives the share, shape (rows, columns of the window).
            window: the collapsed columns.
            counted: the number of repeats, where all columns of the window have the same number.
        """
        count = row.count * self.columns.count if counted is None else counted
        noise = self._noise(row, number, count, window) if self.sharer.noisy else None
        law, values = self.sharer.law, self.values[:, window]
        if law.shares_equally:
            if noise is None:
                np.divide(values, _converted(count, values), out=out)
            else:
                noise.add_to(self._divided(count, window), out)
            return
        output_number = row.other_number * self.columns.other_count + self.columns.other_number
        if not isinstance(output_number, int):
            output_number = output_number[window]
        takes_whole = law.takes_whole(number, count, output_number)
        parts = stretches(takes_whole)
        if parts is None:
            np.copyto(out, np.where(takes_whole, values, values.dtype.type(0)))
            if noise is not None:
                noise.add_to(out, out)
            return
        for where, is_taken in parts:
            if noise is None or not is_taken:
                out[:, where] = values[:, where] if is_taken else 0
            if noise is not None:
                noise.part(where).add_to(values[:, where] if is_taken else out[:, where], out[:, where])

    def _divided(self, count: Number, window: slice) -> Array:
        """The values of a window divided by `count`, computed once for all repeats."""
        known = self._quotient
        if known is None or known[0] != (window.start, window.stop) or not np.array_equal(known[1], count):
            values = self.values[:, window]
            out = self.scratch.array("divided", values.shape, values.dtype)
            known = (window.start, window.stop), count, np.divide(values, _converted(count, values), out=out)
            self._quotient = known
        return known[2]

    def _noise(self, row: Run, number: int, count: Number, window: slice) -> _Noise | None:
        """The noise of repeat `number`. It sums to zero over the repeats of each source index.

        The g are independent normal draws, and each is drawn once for all repeats. Two repeats get +g and -g. Of more
        than two, repeat r gets (g_r - g_{r+1}) / sqrt(2), and the last one gets (g_r - g_0) / sqrt(2). An index that is
        not repeated gets no noise.
        """
        if isinstance(count, int):
            if count == 1:
                return None
            if count == 2:
                return _Noise(self._drawn(row, 0, count, window), negative=number == 1)
            draws, following = (self._drawn(row, repeat % count, count, window) for repeat in (number, number + 1))
            return _Noise(
                np.subtract(draws, following, out=self.scratch.array("noise.apart", draws.shape, draws.dtype))
            )
        noise = self.scratch.array("noise.apart", self.values.shape, self.sharer.work)
        noise[...] = -0.0  # x + -0.0 is x for every x; x + 0.0 would turn -0.0 into 0.0
        for repeats in np.unique(count).tolist():
            if number < repeats > 1:
                where = np.broadcast_to(count == repeats, noise.shape)
                draws = self._drawn(row, 0 if repeats == 2 else number, repeats, window)
                if repeats == 2:
                    np.copyto(noise, draws if number == 0 else -draws, where=where)
                else:
                    np.subtract(
                        draws, self._drawn(row, (number + 1) % repeats, repeats, window), out=noise, where=where
                    )
        return _Noise(noise)

    def _drawn(self, row: Run, repeat: int, count: int, window: slice) -> Array:
        """The draws g of one of `count` repeats for a window of this block, scaled to their final size."""
        key = (repeat, count, window.start, window.stop)
        if key not in self._draws:
            columns, sharer = self.columns, self.sharer
            # A window is one only where the collapsed columns follow one another.
            low, high = columns.low + (window.start or 0), columns.high
            high = high if window.stop is None else columns.low + window.stop
            # A working array of its own for each repeat: a block needs its draws again, and the next block reuses them.
            drawn = draw(
                key_of(sharer.tensor, sharer.strategy.seed, repeat),
                columns.width,
                (row.collapsed, row.length),
                (low, high - low),
                self.scratch,
                sharer.table(count),
                ".".join(map(str, ("noise", *key))),
            )
            if window == EVERY and (columns.drawn.view(drawn) is None or drawn.shape[1] != columns.size):
                drawn = drawn[:, columns.drawn.index]
            self._draws[key] = drawn
        return self._draws[key]

    def _rounded_shares(self, row: Run) -> list[Array]:
        """The shares of all repeats, rounded so that they add up exactly in a coarse type.

        Every share is a whole multiple of the weight's unit in the last place. The shares are kept small enough for the
        type to hold such multiples exactly. The last repeat takes the rest of the weight.
        """
        if row.collapsed not in self._rounded:
            self._rounded = {row.collapsed: self._divide_units(row)}
        return self._rounded[row.collapsed]

    def _divide_units(self, row: Run) -> list[Array]:
        """Divide the weights, counted in their units in the last place, among the repeats."""
        assert self.sharer.bits is not None
        count = row.count * self.columns.count
        most_repeats = int(np.max(count))
        finite = np.isfinite(self.values)
        all_finite = bool(finite.all())
        values = self.values if all_finite else np.where(finite, self.values, 0).astype(self.values.dtype)

        def working(name: str) -> Array:
            return self.scratch.array(f"few.{name}", values.shape, values.dtype)

        unit, most = _unit(values, *self.sharer.bits, self.sharer.spread, working("unit"), working("most"))
        rest = np.divide(values, unit, out=working("rest"))
        np.multiply(np.rint(rest, out=rest), unit, out=rest)
        bound, exact = working("bound"), Block(self.sharer, values, self.columns, self.scratch)
        exact._draws = self._draws
        shares: list[Array] = []
        for number in range(most_repeats):
            share = working(f"share.{number}")
            shares.append(share)
            if isinstance(count, int) and number == count - 1:
                np.copyto(share, rest)
                break
            exact._exact_share(row, number, share)
            with np.errstate(over="ignore"):  # strong noise on a small weight; the bounds below cut it
                np.divide(share, unit, out=share)
            np.multiply(np.rint(share, out=share), unit, out=share)
            np.maximum(np.subtract(rest, most, out=bound), np.negative(most, out=working("least")), out=bound)
            np.maximum(share, bound, out=share)
            np.minimum(np.add(rest, most, out=bound), most, out=bound)
            np.minimum(share, bound, out=share)
            if not isinstance(count, int):
                np.copyto(share, rest, where=np.broadcast_to(count == number + 1, share.shape))
            np.subtract(rest, share, out=rest)
        if not all_finite:
            for share in shares:
                np.copyto(share, self.values, where=~finite)
        return shares


def _converted(number: Number, like: Array) -> Any:
    """A number, or one for each column, in the type of `like`."""
    return like.dtype.type(number) if isinstance(number, int) else number.astype(like.dtype)


def _unit(
    values: Array, bits: int, least: int, largest: float, spread: float, unit: Array, most: Array
) -> tuple[Array, Array]:
    """The unit in the last place of each value in a coarse type, and the largest number that has this unit.

    The unit of zero is made fine enough for the noise, so that a weight of zero gets noise too.

    Args:
        values: float32.
        bits: the bits of the type's significand.
        least: the exponent of the type's smallest positive number.
        largest: the type's largest number.
        spread: the standard deviation of the noise.
        unit: receives the units, in the shape of `values`.
        most: receives the largest numbers.
    """
    # Without sign and significand, the bits of a float32 are 2 ** floor(log2 |value|).
    np.bitwise_and(values.view(np.uint32), np.uint32(0x7F800000), out=unit.view(np.uint32))
    np.multiply(unit, np.float32(2.0 ** (1 - bits)), out=unit)
    np.maximum(unit, np.float32(2.0**least), out=unit)
    if spread > 0.0:
        exponent = max(least, math.frexp(spread)[1] + 3 - bits)  # the largest number of this unit is 8 to 16 spreads
        np.copyto(unit, np.float32(2.0**exponent), where=values == 0)
    np.minimum(np.multiply(unit, np.float32(2.0**bits - 1.0), out=most), np.float32(largest), out=most)
    return unit, most
