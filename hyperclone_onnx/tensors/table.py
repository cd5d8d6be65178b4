"""Computes a grown tensor as rows and columns, a few source rows at a time.

The last axes are the columns: as many axes as keep a row at a moderate length. The other axes are the rows. Grown rows
that repeat the same source rows are computed together. So their source rows are read once, and their noise is drawn
once. Rows that are equal are computed once and written to several places.
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

from hyperclone_onnx.plan.maps import Maps, fills_of, join_axes
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.plan.strategies import Strategy
from hyperclone_onnx.tensors.fresh import Fresh
from hyperclone_onnx.tensors.noise import key_of
from hyperclone_onnx.tensors.noise_level import NoiseLevel, mean_and_deviation
from hyperclone_onnx.tensors.packing import pack
from hyperclone_onnx.tensors.scratch import PAGE, Scratch
from hyperclone_onnx.tensors.shares import Block, Columns, Sharer
from hyperclone_onnx.tensors.source_table import SourceTable
from hyperclone_onnx.tensors.stretches import Run, runs_of

Array = npt.NDArray[Any]

BLOCK = 1 << 17
"""The number of elements in a block. Half a megabyte of float32 stays in the cache of a processor core."""

WIDE = 1 << 18
"""The most elements of a row."""

SHORT = 1 << 14
"""Runs with fewer bytes than this are gathered into one array before they are written."""

Piece = Callable[[Scratch], Iterator[tuple[Array, Sequence[int]]]]
"""Computes a part of a tensor's bytes.

It yields (array, byte offsets in the tensor). The array belongs at each of the offsets, and is valid until the next one
is requested.
"""


class Table:
    """A grown tensor as rows and columns: the indices of both, and the reader of the source rows.

    The index vectors of a long axis take megabytes. So a table is created at the first use of a tensor, and it lives no
    longer than the tensor.

    Args:
        source: the source tensor.
        recipe: the recipe of the grown tensor.
        maps: the source map of each named dimension.
        strategy: the strategy that divides shared dimensions.
        dtype: the type of the result.
    """

    def __init__(
        self, source: ir.TensorProtocol, recipe: Recipe, maps: Maps, strategy: Strategy, dtype: ir.DataType
    ) -> None:
        self.recipe, self.strategy, self.dtype = recipe, strategy, dtype
        self.axes = recipe.index(maps)
        self.split = min(leading_axes([axis.grown for axis in self.axes]), _latest_split(recipe))
        self.rows = join_axes(self.axes[: self.split])
        self.columns = join_axes(self.axes[self.split :])
        self.source = SourceTable(source, recipe, self.axes, self.split)
        self.out_type = np.dtype(dtype.numpy() if recipe.bits is None else np.uint8)
        noisy = recipe.shared and strategy.law.noisy
        self.level = NoiseLevel(self.source, strategy.snr_db) if noisy else None

    @cached_property
    def _sharer(self) -> Sharer | None:
        """Divides the weight among repeats; None where the recipe shares nothing."""
        if not self.recipe.shared:
            return None
        spread = 0.0 if self.level is None else self.level.value * abs(self.recipe.scale)
        return Sharer(self.strategy, self.dtype, self.recipe.noise_name, spread)

    @cached_property
    def _fresh(self) -> Fresh | None:
        """Draws the numbers beside the source's; None where the law repeats the source."""
        if not self.strategy.law.draws_the_rest or not self.recipe.grows:
            return None
        mean, deviation = mean_and_deviation(self.source)
        work = np.float64 if self.dtype == ir.DataType.DOUBLE else np.float32
        return Fresh(key_of(self.recipe.noise_name, self.strategy.seed, 0), mean, deviation, work)

    @cached_property
    def rows_stretch(self) -> Array | None:
        """The factor of each source row; None where all are 1."""
        return self.rows.source_stretch

    @cached_property
    def _every_column(self) -> Columns:
        return Columns(self.columns)

    @cached_property
    def _working_type(self) -> np.dtype[Any]:
        if not self.recipe.shared and self.recipe.scale == 1.0 and not self.recipe.is_stretched:
            return self.out_type
        if not self.dtype.is_floating_point():
            return np.dtype(np.int64)  # quantised biases: their scale shrinks, so they grow by a whole factor
        return np.dtype(np.float64 if self.dtype == ir.DataType.DOUBLE else np.float32)

    def values(self, run: Run, columns: Columns, scratch: Scratch) -> Array:
        """The collapsed columns of the source rows that `run` repeats, multiplied by the recipe's scale and stretches.

        Returns:
            shape (run.length, columns.size), in the working type.
        """
        rows = self.source.read(run.source, run.length, columns.first_source, columns.sources, scratch)
        work, scale = self._working_type, self.recipe.scale
        values = columns.pick.view(rows)
        if values is None or values.dtype != work:
            values = columns.pick.into(rows, scratch.array("picked", (run.length, columns.size), work))
        if scale != 1.0:
            factor = work.type(round(scale) if work.kind == "i" else scale)
            values = np.multiply(values, factor, out=scratch.array("scaled", values.shape, work))
        stretch = self.rows_stretch
        if stretch is not None:
            factors = stretch[run.source : run.source + run.length].astype(work)
            values = np.multiply(values, factors[:, None], out=scratch.array("scaled", values.shape, work))
        if columns.stretch is not None:
            factors = columns.stretch.astype(work)
            values = np.multiply(values, factors, out=scratch.array("scaled", values.shape, work))
        return values

    def results(self, runs: Sequence[Run], columns: Columns, scratch: Scratch) -> Iterator[tuple[Array, list[Run]]]:
        """Compute the grown rows of runs that repeat the same source rows. Equal rows are computed once.

        Yields:
            (rows, the runs that have them); the rows have shape (length of a run, grown columns) and the type
            `out_type`. An array is valid until the next one is requested.
        """
        values = self.values(runs[0], columns, scratch)
        sharer = self._sharer
        if self._fresh is not None:
            for run in runs:
                yield self._cast(self._fresh.beside(values, run, columns, scratch), scratch), [run]
            return
        if sharer is None:
            yield self._cast(values, scratch), list(runs)
            return
        equal_runs: dict[tuple[int, ...], list[Run]] = defaultdict(list)
        for run in runs:
            key = () if sharer.all_alike else (run.collapsed, run.number, run.other_number)
            equal_runs[run.count, *key].append(run)
        blocks: dict[int, Block] = {}
        for group in sorted(equal_runs.values(), key=lambda runs: (runs[0].collapsed, runs[0].number)):
            run = group[0]
            if run.collapsed not in blocks:
                blocks = {run.collapsed: Block(sharer, values, columns, scratch)}
            out = scratch.array("out", (run.length, columns.grown), values.dtype)
            blocks[run.collapsed].fill(run, out)
            yield self._cast(out, scratch), group

    def _cast(self, values: Array, scratch: Scratch) -> Array:
        if values.dtype == self.out_type:
            return values
        out = scratch.array("cast", values.shape, self.out_type)
        np.copyto(out, values, casting="unsafe")
        return out

    def window(self, windows: Sequence[slice], scratch: Scratch | None = None) -> Array:
        """A slice of the grown tensor, of the type `out_type`; one window for each axis."""
        scratch = scratch or Scratch()
        axes = [axis[window] for axis, window in zip(self.axes, windows, strict=True)]
        out = np.empty([axis.grown for axis in axes], dtype=self.out_type)
        rows, columns = join_axes(axes[: self.split]), Columns(join_axes(axes[self.split :]), self.columns)
        table = out.reshape(rows.grown, columns.grown)
        if out.size:
            for runs in self._grouped(runs_of(rows), columns.size):
                for values, equal_runs in self.results(runs, columns, scratch):
                    for run in equal_runs:
                        table[run.start : run.start + run.length] = values
        return out

    def _grouped(self, runs: Sequence[Run], width: int, stride: int = PAGE) -> Iterator[list[Run]]:
        """Cut runs into blocks, and put the blocks of the same source rows together.

        Args:
            runs: the runs of rows.
            width: the number of elements to compute for a row.
            stride: the bytes of a row in the file. A block fills whole pages of the file where its size allows it.
        """
        block = max(1, BLOCK // max(1, width))
        page_rows = PAGE // math.gcd(stride, PAGE)
        block -= block % page_rows if block > page_rows else 0
        groups: dict[tuple[int, int], list[Run]] = defaultdict(list)
        for run in runs:
            for part in run.cut(block, run.source):
                groups[part.source, part.length].append(part)
        return iter(groups.values())

    def pieces(self) -> Iterator[Piece]:
        """The functions that compute the tensor's bytes for a file. Together they compute each byte once."""
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
        for values, equal_runs in self.results(runs, self._every_column, scratch):
            yield self._packed(values), [run.start * stride for run in equal_runs]

    def _gathered(self, start: int, end: int, stride: int, scratch: Scratch) -> Iterator[tuple[Array, Sequence[int]]]:
        out = scratch.array("gathered", (end - start, self.columns.grown), self.out_type)
        for runs in self._grouped(runs_of(self.rows[start:end]), self._every_column.size):
            for values, equal_runs in self.results(runs, self._every_column, scratch):
                for run in equal_runs:
                    out[run.start : run.start + run.length] = values
        yield self._packed(out), [start * stride]

    def _whole(self, _: Scratch) -> Iterator[tuple[Array, Sequence[int]]]:
        yield self._packed(self.window([slice(None)] * len(self.axes)).reshape(1, -1)), [0]

    def _packed(self, rows: Array) -> Array:
        """Rows as a file stores them, contiguous in memory."""
        if self.source.bits is None:
            return np.ascontiguousarray(rows)
        numbers = rows.view(np.uint8)
        if self.recipe.bits is not None and self.axes:
            numbers = numbers.reshape(-1, self.axes[-1].grown)
        return pack(numbers, self.source.bits)


def _latest_split(recipe: Recipe) -> int:
    """The most leading axes that can be rows. An axis with a fill is a column, or makes up the rows alone."""
    filled = [number for number, axis in enumerate(recipe.axes) if any(map(fills_of, axis))]
    return min((max(number, 1) for number in filled), default=len(recipe.axes))


def leading_axes(shape: Sequence[int]) -> int:
    """The number of leading axes that are rows: as few as keep a row within `WIDE` elements."""
    if len(shape) < 2:
        return 0
    return next((axes for axes in range(1, len(shape)) if math.prod(shape[axes:]) <= WIDE), len(shape) - 1)
