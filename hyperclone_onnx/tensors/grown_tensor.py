"""Any slice of a grown tensor, computed from the source tensor and a recipe alone.

The result of a slice does not depend on how the tensor is sliced, nor on who computes the other slices: all of it is
elementwise, and noise is a function of its place (`noise.py`). What a file needs is made piece by
piece (`grown_table.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.plan.maps import Maps, grown_size
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.plan.strategies import Strategy
from hyperclone_onnx.tensors.packing import pack, packed_width
from hyperclone_onnx.tensors.table import Piece, Table

Array = npt.NDArray[Any]


class GrownTensor:
    """The grown tensor that `recipe` makes from `source`, lazily.

    Args:
        source: the source tensor; one in a file is read from there, a few rows at a time.
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
        self.maps = maps
        self.strategy = strategy
        self.dtype = dtype or source.dtype

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The grown shape."""
        return tuple(math.prod(grown_size(factor, self.maps) for factor in axis) for axis in self.recipe.axes)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the file, which differs from `shape` where several numbers are packed in a byte."""
        if self.recipe.bits is None:
            return self.shape
        *rows, width = self.shape
        packed = (*rows, packed_width(width, self.recipe.bits))
        return packed if len(self.source.shape) == len(packed) else (math.prod(packed),)

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in a file."""
        return -(-math.prod(self.stored_shape) * self.dtype.bitwidth // 8)

    @property
    def is_shared(self) -> bool:
        """Whether any repeats divide the weight among them."""
        return bool(self.recipe.shared)

    @property
    def is_copy(self) -> bool:
        """Whether every element is one of the source's, bit by bit."""
        return not self.is_shared and self.recipe.scale == 1.0 and self.dtype == self.source.dtype

    @cached_property
    def table(self) -> Table:
        """The tensor as rows and columns."""
        return Table(self.source, self.recipe, self.maps, self.strategy, self.dtype)

    def fresh(self) -> GrownTensor:
        """The same tensor with nothing held in memory."""
        return GrownTensor(self.source, self.recipe, self.maps, self.strategy, self.dtype)

    def stored(self) -> Array:
        """The whole tensor as it stands in the file, of shape `stored_shape`."""
        array = self.numpy()
        if self.recipe.bits is None:
            return array
        return pack(array, self.recipe.bits).reshape(self.stored_shape)

    def numpy(self) -> Array:
        """The whole tensor."""
        return self[()]

    def __getitem__(self, windows: tuple[slice, ...]) -> Array:
        """A slice of the grown tensor: one slice with step 1 for each leading axis.

        Only what the slice needs is read and computed (where there is noise, the source is read once, for its level).
        """
        full = (*windows, *[slice(None)] * (len(self.shape) - len(windows)))
        return self.table.window(full)

    def pieces(self) -> Iterator[Piece]:
        """What makes the tensor's bytes as they stand in a file, in any order, by any number of workers."""
        return self.table.pieces()

    def as_lazy(self, name: str) -> LazyGrown:
        """This tensor for an ONNX graph; computed when it is written."""
        return LazyGrown(self, name)


class LazyGrown(ir.LazyTensor):
    """A grown tensor in a graph. A writer that knows it streams `grown` instead of asking for the whole."""

    def __init__(self, grown: GrownTensor, name: str) -> None:
        self.grown = grown
        super().__init__(
            lambda: ir.Tensor(grown.fresh().stored(), dtype=grown.dtype, name=name),
            dtype=grown.dtype,
            shape=ir.Shape(grown.stored_shape),
            name=name,
        )
