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

from hyperclone_onnx.plan.maps import Maps, join_axes
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.plan.strategies import Strategy
from hyperclone_onnx.tensors.noise_level import NoiseLevel
from hyperclone_onnx.tensors.packing import pack
from hyperclone_onnx.tensors.scratch import PAGE, Scratch
from hyperclone_onnx.tensors.shares import Block, Columns, Sharer
from hyperclone_onnx.tensors.source_table import SourceTable
from hyperclone_onnx.tensors.stretches import Run, runs_of

Array = npt.NDArray[Any]

BLOCK = 1 << 17
"""Tensors are computed in blocks of about this many elements: half a megabyte of float32 stays in a core's cache."""

WIDE = 1 << 18
"""Axes are columns as long as a row has no more elements than this."""

SHORT = 1 << 14
"""Runs of fewer bytes than this are gathered before they are written."""

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
        self.source = SourceTable(source, recipe, self.axes, self.split)
        self.out_type = np.dtype(dtype.numpy() if recipe.bits is None else np.uint8)
        noisy = recipe.shared and strategy.law.noisy
        self.level = NoiseLevel(self.source, strategy.snr_db) if noisy else None

    # -- computing ----------------------------------------------------------------------------------------

    @cached_property
    def _sharer(self) -> Sharer | None:
        """Who divides the repeats; None where nothing is divided."""
        if not self.recipe.shared:
            return None
        spread = 0.0 if self.level is None else self.level.value * abs(self.recipe.scale)
        return Sharer(self.strategy, self.dtype, self.recipe.noise_name, spread)

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
        found = self.source.read(run.source, run.length, columns.first_source, columns.sources, scratch)
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

    def _grouped(self, runs: Sequence[Run], width: int, stride: int = PAGE) -> Iterator[list[Run]]:
        """Runs cut into blocks, those of the same source rows together; blocks are whole pages where they can be."""
        block = max(1, BLOCK // max(1, width))
        whole = PAGE // math.gcd(stride, PAGE)  # rows that fill pages
        block -= block % whole if block > whole else 0
        groups: dict[tuple[int, int], list[Run]] = defaultdict(list)
        for run in runs:
            for part in run.cut(block, run.source):
                groups[part.source, part.length].append(part)
        return iter(groups.values())

    # -- for files ----------------------------------------------------------------------------------------

    def pieces(self) -> Iterator[Piece]:
        """What makes the tensor's bytes as they stand in a file."""
        runs = runs_of(self.rows) if self.columns.grown else []
        if not self.source.by_rows:
            yield self._whole
            return
        stride = self.source.grown_row_bytes(self.out_type.itemsize)
        if len(runs) > 1 and self.rows.grown * stride < SHORT * len(runs):
            step = max(1, BLOCK // self.columns.grown)
            for start in range(0, self.rows.grown, step):
                yield partial(self._gathered, start, min(start + step, self.rows.grown), stride)
            return
        for group in self._grouped(runs, self._every_column.size, stride):
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
        if self.source.bits is None:
            return np.ascontiguousarray(rows)
        numbers = rows.view(np.uint8)
        if self.recipe.bits is not None and self.axes:
            numbers = numbers.reshape(-1, self.axes[-1].grown)
        return pack(numbers, self.source.bits)


def _split(shape: Sequence[int]) -> int:
    """How many of the axes are rows."""
    if len(shape) < 2:
        return 0
    return next((axes for axes in range(1, len(shape)) if math.prod(shape[axes:]) <= WIDE), len(shape) - 1)
