"""The shares of a weight's repeats, on the collapsed tensor: where each shared index stands once.

Everything here is elementwise, so that a share does not depend on the window that it is computed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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

PRECISION = {ir.DataType.FLOAT16: (11, -24, 65504.0), ir.DataType.BFLOAT16: (8, -133, 3.3895e38)}
"""The bits of a significand, the exponent of the least number, and the largest one, of types in which rounding shares
would show."""


class Columns:
    """The columns of a window of the grown tensor, and those of the collapsed tensor that they come from."""

    def __init__(self, axis: AxisIndex, whole: AxisIndex | None = None) -> None:
        collapsed, first, place = _unique(axis.collapsed)
        self.width = axis.collapsed_size if whole is None else whole.collapsed_size
        """The columns of the whole collapsed tensor."""
        self.grown = axis.grown
        self.collapsed = collapsed
        self.low = int(collapsed[0]) if len(collapsed) else 0
        self.high = int(collapsed[-1]) + 1 if len(collapsed) else 0
        source = axis.source[first]
        self.first_source = int(source.min()) if len(source) else 0
        self.sources = int(source.max()) + 1 - self.first_source if len(source) else 0
        self.pick = Pick(source - self.first_source)
        """The collapsed columns out of the source's, counted from `first_source`."""
        self.drawn = Pick(collapsed - self.low)
        self.count = one_if_constant(axis.count[first])
        self.other_number = one_if_constant(axis.other_number[first])
        self.other_count = one_if_constant(axis.other_count[first])
        self.parts = list(_parts(axis, place))
        """(number, count, the columns that this repeat fills, the collapsed columns that fill them)"""
        self.direct = len(self.parts) == 1 and len(collapsed) == axis.grown and bool((np.diff(place) == 1).all())
        """Whether the columns are the collapsed ones."""

    @property
    def size(self) -> int:
        """How many collapsed columns there are."""
        return len(self.collapsed)


def _unique(index: Indices) -> tuple[Indices, slice | Indices, Indices]:
    """The different indices in order, where each stands first, and which of them each index is."""
    if len(index) and bool((np.diff(index) == 1).all()):  # none is repeated: nothing is to be sorted
        return index, slice(None), index - index[0]
    collapsed, first, place = np.unique(index, return_index=True, return_inverse=True)
    return collapsed, first, place.reshape(-1)


@dataclass(frozen=True)
class Part:
    """The columns that are filled by one repeat of their source index."""

    number: int
    count: int
    columns: slice | Indices
    taken: Pick


def _parts(axis: AxisIndex, place: Indices) -> list[Part]:
    if axis.grown == 0:
        return []
    number, count = one_if_constant(axis.number), one_if_constant(axis.count)
    if isinstance(number, int) and isinstance(count, int):
        return [Part(number, count, slice(0, axis.grown), Pick(place))]
    kinds = axis.count * (int(axis.number.max()) + 1) + axis.number
    parts: list[Part] = []
    for kind in np.unique(kinds):
        columns = np.flatnonzero(kinds == kind)
        number, count = int(axis.number[columns[0]]), int(axis.count[columns[0]])
        together = int(columns[-1]) - int(columns[0]) + 1 == len(columns)
        where = slice(int(columns[0]), int(columns[-1]) + 1) if together else columns
        parts.append(Part(number, count, where, Pick(place[columns])))
    return parts


class Sharer:
    """Divides the values of one weight among repeats.

    Args:
        strategy: how.
        dtype: the type that the shares are stored in.
        tensor: the name by which noise is drawn.
        spread: the noise's standard deviation for a weight that is not divided; 0 for none.
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
        """Whether every repeat gets the same."""
        return not self.noisy and self.law.shares_equally and self.bits is None

    def table(self, count: int) -> Array:
        """The noise to draw from for `count` repeats, as large as it is added."""
        if count not in self._tables:
            amplitude = self.law.noise_scale(count)
            amplitude *= self.spread * (1.0 if count == 2 else math.sqrt(0.5))
            self._tables[count] = np.multiply(quantiles(), self.work(amplitude), dtype=self.work)
        return self._tables[count]


@dataclass(frozen=True)
class _Noise:
    """What one repeat's noise is, or its negative."""

    values: Array
    negative: bool = False

    def part(self, columns: slice) -> _Noise:
        return _Noise(self.values[:, columns], self.negative)

    def added(self, to: Array, out: Array) -> None:
        (np.subtract if self.negative else np.add)(to, self.values, out=out)


class Block:
    """The values of some rows of the collapsed tensor, divided among repeats on demand.

    Args:
        sharer: how they are divided.
        values: shape (rows, collapsed columns), in the sharer's working type; not changed.
        columns: which columns they are.
        scratch: holds working arrays.
    """

    def __init__(self, sharer: Sharer, values: Array, columns: Columns, scratch: Scratch) -> None:
        self.sharer, self.values, self.columns, self.scratch = sharer, values, columns, scratch
        self._draws: dict[tuple[int, int], Array] = {}
        self._whole: dict[int, list[Array]] = {}
        self._by: tuple[Number, Array] | None = None

    def fill(self, row: Run, out: Array) -> None:
        """The grown columns of the rows that `row` repeats, shape (rows, grown columns)."""
        columns = self.columns
        for part in columns.parts:
            number = row.number * part.count + part.number
            if columns.direct:
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
        """What repeat `number` takes of all values."""
        if self.sharer.bits is not None:
            out[...] = self._of_few_bits(row)[number]
        else:
            self._plain(row, number, out)

    def _plain(self, row: Run, number: int, out: Array) -> None:
        count = row.count * self.columns.count
        noise = self._noise(row, number, count) if self.sharer.noisy else None
        law = self.sharer.law
        if law.shares_equally:
            if noise is None:
                np.divide(self.values, _as(count, self.values), out=out)
            else:
                noise.added(self._divided(count), out)
            return
        other = row.other_number * self.columns.other_count + self.columns.other_number
        chosen = law.takes_whole(number, count, other)
        parts = stretches(chosen)
        if parts is None:
            np.copyto(out, np.where(chosen, self.values, self.values.dtype.type(0)))
            if noise is not None:
                noise.added(out, out)
            return
        for where, taken in parts:
            if noise is None or not taken:
                out[:, where] = self.values[:, where] if taken else 0
            if noise is not None:
                noise.part(where).added(self.values[:, where] if taken else out[:, where], out[:, where])

    def _divided(self, count: Number) -> Array:
        """The values by `count`, once for all repeats."""
        if self._by is None or not np.array_equal(self._by[0], count):
            out = self.scratch.array("divided", self.values.shape, self.values.dtype)
            self._by = count, np.divide(self.values, _as(count, self.values), out=out)
        return self._by[1]

    def _noise(self, row: Run, number: int, count: Number) -> _Noise | None:
        """Noise that sums to zero over the repeats of each source index, and is drawn once for all of them.

        Two repeats get +g and -g; of more, repeat r gets (g_r - g_{r+1}) / sqrt(2), the last one wrapping to g_0, with
        g independent normal draws. An index that is not repeated gets none.
        """
        if isinstance(count, int):
            if count == 1:
                return None
            if count == 2:
                return _Noise(self._drawn(row, 0, count), negative=number == 1)
            own, following = (self._drawn(row, r % count, count) for r in (number, number + 1))
            return _Noise(np.subtract(own, following, out=self.scratch.array("noise.apart", own.shape, own.dtype)))
        noise = self.scratch.array("noise.apart", self.values.shape, self.sharer.work)
        noise[...] = -0.0  # added to anything it leaves it as it is
        for each in np.unique(count).tolist():
            if number < each > 1:
                there = np.broadcast_to(count == each, noise.shape)
                own = self._drawn(row, 0 if each == 2 else number, each)
                if each == 2:
                    np.copyto(noise, own if number == 0 else -own, where=there)
                else:
                    np.subtract(own, self._drawn(row, (number + 1) % each, each), out=noise, where=there)
        return _Noise(noise)

    def _drawn(self, row: Run, repeat: int, count: int) -> Array:
        """The noise of one repeat on these rows, as large as it is added."""
        key = (repeat, count)
        if key not in self._draws:
            columns, sharer = self.columns, self.sharer
            # Kept while the block lasts: the next block uses the same memory again.
            drawn = draw(
                key_of(sharer.tensor, sharer.strategy.seed, repeat),
                columns.width,
                (row.collapsed, row.length),
                (columns.low, columns.high - columns.low),
                self.scratch,
                sharer.table(count),
                f"noise.{repeat}.{count}",
            )
            if columns.drawn.view(drawn) is None or drawn.shape[1] != columns.size:
                drawn = drawn[:, columns.drawn.index]
            self._draws[key] = drawn
        return self._draws[key]

    def _of_few_bits(self, row: Run) -> list[Array]:
        """The shares of all repeats, where they must be whole units in the last place to add up.

        Those of the weight do, as long as all shares are near enough to it to have that unit; the last repeat takes
        what the others leave.
        """
        if row.collapsed not in self._whole:
            self._whole = {row.collapsed: self._divide_units(row)}
        return self._whole[row.collapsed]

    def _divide_units(self, row: Run) -> list[Array]:
        assert self.sharer.bits is not None
        count = row.count * self.columns.count
        most_repeats = int(np.max(count))
        finite = np.isfinite(self.values)
        all_finite = bool(finite.all())
        values = self.values if all_finite else np.where(finite, self.values, 0).astype(self.values.dtype)

        def held(name: str) -> Array:
            return self.scratch.array(f"few.{name}", values.shape, values.dtype)

        unit, most = _unit(values, *self.sharer.bits, self.sharer.spread, held("unit"), held("most"))
        rest = np.divide(values, unit, out=held("rest"))
        np.multiply(np.rint(rest, out=rest), unit, out=rest)
        bound, plain = held("bound"), Block(self.sharer, values, self.columns, self.scratch)
        plain._draws = self._draws
        shares: list[Array] = []
        for number in range(most_repeats):
            share = held(f"share.{number}")
            shares.append(share)
            if isinstance(count, int) and number == count - 1:
                np.copyto(share, rest)
                break
            plain._plain(row, number, share)
            with np.errstate(over="ignore"):  # far more than the weight: it is cut below
                np.divide(share, unit, out=share)
            np.multiply(np.rint(share, out=share), unit, out=share)
            np.maximum(np.subtract(rest, most, out=bound), np.negative(most, out=held("least")), out=bound)
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


def _as(number: Number, like: Array) -> Any:
    return like.dtype.type(number) if isinstance(number, int) else number.astype(like.dtype)


def _unit(
    values: Array, bits: int, least: int, largest: float, spread: float, unit: Array, most: Array
) -> tuple[Array, Array]:
    """The unit in the last place of each value in a type of few bits, and the largest number that has it.

    Zero has a unit fine enough for the noise, so that it gets its share of it.
    """
    np.bitwise_and(values.view(np.uint32), np.uint32(0x7F800000), out=unit.view(np.uint32))  # 2 ** floor(log2 |value|)
    np.multiply(unit, np.float32(2.0 ** (1 - bits)), out=unit)
    np.maximum(unit, np.float32(2.0**least), out=unit)
    if spread > 0.0:
        fine = max(least, math.frexp(spread)[1] + 3 - bits)  # the largest number of that unit is 8 to 16 spreads
        np.copyto(unit, np.float32(2.0**fine), where=values == 0)
    np.minimum(np.multiply(unit, np.float32(2.0**bits - 1.0), out=most), np.float32(largest), out=most)
    return unit, most
