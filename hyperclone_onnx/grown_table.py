"""A grown tensor as rows and columns, computed a few source rows at a time.

The last axes, as many as make a row of moderate length, are the columns; the others are the rows. Rows that repeat the
same source rows are made together: the source is read once, noise is drawn once, and rows that come out alike are made
once and named for several places.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.maps import Maps, join_axes
from hyperclone_onnx.packing import pack, packed_width, unpack
from hyperclone_onnx.plan import Recipe
from hyperclone_onnx.runs import Run, runs_of
from hyperclone_onnx.scratch import Scratch
from hyperclone_onnx.shares import Block, Columns, Sharer
from hyperclone_onnx.stored_rows import StoredRows
from hyperclone_onnx.strategies import Strategy

Array = npt.NDArray[Any]

BLOCK = 1 << 17
"""Tensors are computed in blocks of about this many elements: half a megabyte of float32 stays in a core's cache."""

WIDE = 1 << 18
"""Axes are columns as long as a row has no more elements than this."""

SHORT = 1 << 14
"""Runs of fewer bytes than this are gathered before they are written."""

STEPS = 1 << 13
"""The noise's level is rounded to so many steps, so that the order in which squares are added up does not show."""

Piece = Callable[[Scratch], Iterator[tuple[Array, Sequence[int]]]]
"""Makes some bytes of a tensor; each array belongs at every one of the byte offsets beside it."""


class Table:
    """A grown tensor as rows and columns: the indices of both, and where the source's rows are read.

    Indices are vectors, megabytes for a long axis: a table is made where a tensor is used, and dropped with it.
    """

    def __init__(
        self, source: ir.TensorProtocol, recipe: Recipe, maps: Maps, strategy: Strategy, dtype: ir.DataType
    ) -> None:
        self.recipe, self.strategy, self.dtype = recipe, strategy, dtype
        self.axes = recipe.index(maps)
        self.split = _split([axis.grown for axis in self.axes])
        self.rows = join_axes(self.axes[: self.split])
        self.columns = join_axes(self.axes[self.split :])
        self.code_bits = recipe.bits or (source.dtype.bitwidth if source.dtype.bitwidth < 8 else None)
        """The bits of a number where several are stored in a byte."""
        self.source_type = np.dtype(source.dtype.numpy() if recipe.bits is None else np.uint8)
        self.out_type = np.dtype(dtype.numpy() if recipe.bits is None else np.uint8)
        self.by_rows = all(self._whole_bytes(axis_size) for axis_size in ("source_size", "grown"))
        """Whether each row begins with a byte of its own."""
        self.stored = self._open(source)
        self.level = _Level(self) if recipe.shared and strategy.noisy else None

    def _whole_bytes(self, size: str) -> bool:
        return self.code_bits is None or self.recipe.bits is not None or self._elements(size) * self.code_bits % 8 == 0

    def _elements(self, size: str) -> int:
        return int(getattr(self.columns, size))

    def _row_bytes(self, size: str, item: int) -> int:
        """The bytes of a row of the source ("source_size") or of the grown tensor ("grown")."""
        elements = self._elements(size)
        if self.recipe.bits is not None and self.axes:
            last = int(getattr(self.axes[-1], size))
            return elements // max(last, 1) * packed_width(last, self.recipe.bits)
        return elements * self.code_bits // 8 if self.code_bits is not None else elements * item

    def _open(self, source: ir.TensorProtocol) -> StoredRows:
        if self.by_rows:
            return StoredRows(source, self.rows.source_size, self._row_bytes("source_size", self.source_type.itemsize))
        # Rows that begin within a byte are held in memory, one number to a byte.
        plain = ir.Tensor(np.ascontiguousarray(source.numpy()).view(np.uint8), name=source.name)
        return StoredRows(plain, self.rows.source_size, self.columns.source_size)

    # -- reading ------------------------------------------------------------------------------------------

    def read(self, first: int, count: int, start: int, length: int, scratch: Scratch) -> Array:
        """Columns [start, start + length) of some source rows, one number to an element."""
        if self.code_bits is None or not self.by_rows:
            item = self.source_type.itemsize
            return self.stored.read_part(first, count, start * item, length * item, scratch).view(self.source_type)
        raw = self.stored.read(first, count, scratch)
        width = self.columns.source_size
        last = self.axes[-1].source_size if self.recipe.bits is not None and self.axes else width
        numbers = unpack(raw, (count * (width // max(last, 1)), last), self.code_bits).reshape(count, width)
        return numbers[:, start : start + length].view(self.source_type)

    # -- computing ----------------------------------------------------------------------------------------

    @cached_property
    def _sharer(self) -> Sharer | None:
        """Who divides the repeats; None where nothing is divided."""
        if not self.recipe.shared:
            return None
        spread = 0.0 if self.level is None else self.level.value * abs(self.recipe.scale)
        return Sharer(self.strategy, self.dtype, self.recipe.source, spread)

    @cached_property
    def _every_column(self) -> Columns:
        return Columns(self.columns)

    @cached_property
    def _working_type(self) -> np.dtype[Any]:
        if not self.recipe.shared and self.recipe.scale == 1.0:
            return self.out_type
        if not self.dtype.is_floating_point():
            return np.dtype(np.int64)  # biases in units of a scale that shrinks: whole multiples
        return np.dtype(np.float64 if self.dtype == ir.DataType.DOUBLE else np.float32)

    def values(self, run: Run, columns: Columns, scratch: Scratch) -> Array:
        """The source's values at collapsed columns of the rows that `run` repeats, times the recipe's scale."""
        found = self.read(run.source, run.length, columns.first_source, columns.sources, scratch)
        work, scale = self._working_type, self.recipe.scale
        values = columns.pick.view(found)
        if values is None or values.dtype != work:
            values = columns.pick.into(found, scratch.array("picked", (run.length, columns.size), work))
        if scale != 1.0:
            factor = work.type(round(scale) if work.kind == "i" else scale)
            values = np.multiply(values, factor, out=scratch.array("scaled", values.shape, work))
        return values

    def results(self, runs: Sequence[Run], columns: Columns, scratch: Scratch) -> Iterator[tuple[Array, list[Run]]]:
        """The grown rows of runs that repeat the same source rows; those that come out alike are made once.

        An array is valid until the next one is asked for.
        """
        values = self.values(runs[0], columns, scratch)
        sharer = self._sharer
        if sharer is None:
            yield self._cast(values, scratch), list(runs)
            return
        alike: dict[tuple[int, ...], list[Run]] = defaultdict(list)
        for run in runs:
            rest = () if sharer.all_alike else (run.collapsed, run.number, run.other_number)
            alike[run.count, *rest].append(run)
        blocks: dict[int, Block] = {}
        for same in sorted(alike.values(), key=lambda each: (each[0].collapsed, each[0].number)):
            run = same[0]
            if run.collapsed not in blocks:
                blocks = {run.collapsed: Block(sharer, values, columns, scratch)}
            out = scratch.array("out", (run.length, columns.grown), values.dtype)
            blocks[run.collapsed].fill(run, out)
            yield self._cast(out, scratch), same

    def _cast(self, values: Array, scratch: Scratch) -> Array:
        if values.dtype == self.out_type:
            return values
        out = scratch.array("cast", values.shape, self.out_type)
        np.copyto(out, values, casting="unsafe")
        return out

    def window(self, windows: Sequence[slice], scratch: Scratch | None = None) -> Array:
        """A slice of the grown tensor, a window for each axis."""
        scratch = scratch or Scratch()
        axes = [axis[window] for axis, window in zip(self.axes, windows, strict=True)]
        out = np.empty([axis.grown for axis in axes], dtype=self.out_type)
        rows, columns = join_axes(axes[: self.split]), Columns(join_axes(axes[self.split :]), self.columns)
        table = out.reshape(rows.grown, columns.grown)
        if out.size:
            for runs in self._grouped(runs_of(rows), columns.size):
                for made, same in self.results(runs, columns, scratch):
                    for run in same:
                        table[run.start : run.start + run.length] = made
        return out

    def _grouped(self, runs: Sequence[Run], width: int) -> Iterator[list[Run]]:
        """Runs cut into blocks, those of the same source rows together."""
        block = max(1, BLOCK // max(1, width))
        groups: dict[tuple[int, int], list[Run]] = defaultdict(list)
        for run in runs:
            for part in run.cut(block, run.source):
                groups[part.source, part.length].append(part)
        return iter(groups.values())

    # -- for files ----------------------------------------------------------------------------------------

    def preparations(self) -> Iterator[Callable[[Scratch], None]]:
        """What is worth doing before `pieces`; what is not done by then the pieces do."""
        return iter(()) if self.level is None else self.level.preparations()

    def pieces(self) -> Iterator[Piece]:
        """What makes the tensor's bytes as they stand in a file."""
        runs = runs_of(self.rows) if self.columns.grown else []
        if not self.by_rows:
            yield self._whole
            return
        stride = self._row_bytes("grown", self.out_type.itemsize)
        if len(runs) > 1 and self.rows.grown * stride < SHORT * len(runs):
            step = max(1, BLOCK // self.columns.grown)
            for start in range(0, self.rows.grown, step):
                yield partial(self._gathered, start, min(start + step, self.rows.grown), stride)
            return
        for group in self._grouped(runs, self._every_column.size):
            yield partial(self._piece, group, stride)

    def _piece(self, runs: Sequence[Run], stride: int, scratch: Scratch) -> Iterator[tuple[Array, Sequence[int]]]:
        for made, same in self.results(runs, self._every_column, scratch):
            yield self._packed(made), [run.start * stride for run in same]

    def _gathered(self, start: int, end: int, stride: int, scratch: Scratch) -> Iterator[tuple[Array, Sequence[int]]]:
        out = scratch.array("gathered", (end - start, self.columns.grown), self.out_type)
        for runs in self._grouped(runs_of(self.rows[start:end]), self._every_column.size):
            for made, same in self.results(runs, self._every_column, scratch):
                for run in same:
                    out[run.start : run.start + run.length] = made
        yield self._packed(out), [start * stride]

    def _whole(self, _: Scratch) -> Iterator[tuple[Array, Sequence[int]]]:
        yield self._packed(self.window([slice(None)] * len(self.axes)).reshape(1, -1)), [0]

    def _packed(self, rows: Array) -> Array:
        """Rows as they are stored, contiguous."""
        if self.code_bits is None:
            return np.ascontiguousarray(rows)
        numbers = rows.view(np.uint8)
        if self.recipe.bits is not None and self.axes:
            numbers = numbers.reshape(-1, self.axes[-1].grown)
        return pack(numbers, self.code_bits)


class _Level:
    """The noise's standard deviation for a weight that is not divided: rms(W) * 10 ** (-snr / 20).

    Numbers that are not finite are left out.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        height, width = table.rows.source_size, table.columns.source_size
        step = max(1, (1 << 20) // max(1, width))
        self.blocks = [(first, min(step, height - first)) for first in range(0, height if width else 0, step)]
        self.squares: list[tuple[float, int] | None] = [None] * len(self.blocks)

    def preparations(self) -> Iterator[Callable[[Scratch], None]]:
        """Add up the squares of each block."""
        for index in range(len(self.blocks)):
            yield partial(self._do, index)

    def _do(self, index: int, scratch: Scratch) -> None:
        self._add_up(index, scratch)

    def _add_up(self, index: int, scratch: Scratch) -> tuple[float, int]:
        done = self.squares[index]
        if done is None:
            first, count = self.blocks[index]
            total, counted = 0.0, 0
            step = max(1, BLOCK // max(1, self.table.columns.source_size))
            for start in range(first, first + count, step):
                size = min(step, first + count - start)
                found = self.table.read(start, size, 0, self.table.columns.source_size, scratch)
                wide = scratch.array("squares", found.shape, np.float64)
                np.copyto(wide, found)
                part = np.square(wide, out=wide)
                if not math.isfinite(summed := float(part.sum())):
                    part = part[np.isfinite(part)]
                    summed = float(part.sum())
                total, counted = total + summed, counted + part.size
            done = self.squares[index] = (total, counted)
        return done

    @cached_property
    def value(self) -> float:
        """The level."""
        scratch = Scratch()
        sums = [self._add_up(index, scratch) for index in range(len(self.blocks))]
        counted = sum(count for _, count in sums)
        if not counted:
            return 0.0
        rms = math.sqrt(sum(total for total, _ in sums) / counted)
        mantissa, exponent = math.frexp(rms)
        rounded = math.ldexp(round(mantissa * STEPS) / STEPS, exponent)
        return float(rounded * 10.0 ** (-self.table.strategy.snr_db / 20.0))


def _split(shape: Sequence[int]) -> int:
    """How many of the axes are rows."""
    if len(shape) < 2:
        return 0
    return next((axes for axes in range(1, len(shape)) if math.prod(shape[axes:]) <= WIDE), len(shape) - 1)
