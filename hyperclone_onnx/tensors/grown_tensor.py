"""A grown tensor, any slice of which is computed from the source tensor and a recipe.

An element has the same value in every slice that contains it. This holds because the computation is elementwise, and
because noise depends only on its place in the tensor (`noise.py`). The bytes of a file are computed piece by piece
(`table.py`).
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
    """The grown tensor that `recipe` describes, computed from `source` on demand.

    Args:
        source: the source tensor. A tensor in a file is read a few rows at a time.
        recipe: the axes, and which of their dimensions are shared.
        maps: the source map of each named dimension.
        strategy: the strategy that divides a weight along its shared dimensions.
        dtype: the type of the computation and of the result, by default the source's type. Float64 shows that a plan
            is right: the shares of a float32 weight then add up to it, with almost no rounding error.
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
        """The shape in the file. It differs from `shape` where several numbers are packed in a byte."""
        if self.recipe.bits is None:
            return self.shape
        *rows, width = self.shape
        packed = (*rows, packed_width(width, self.recipe.bits))
        return packed if len(self.source.shape) == len(packed) else (math.prod(packed),)

    @property
    def nbytes(self) -> int:
        """The number of bytes that the tensor takes in a file."""
        return -(-math.prod(self.stored_shape) * self.dtype.bitwidth // 8)

    @property
    def is_shared(self) -> bool:
        """Whether any repeats divide the weight among themselves."""
        return bool(self.recipe.shared)

    @property
    def is_copy(self) -> bool:
        """Whether every element is bit by bit an element of the source."""
        scaled = self.recipe.scale != 1.0 or self.recipe.is_stretched
        drawn = self.strategy.law.draws_the_rest
        return not self.is_shared and not scaled and not drawn and self.dtype == self.source.dtype

    @cached_property
    def table(self) -> Table:
        """The tensor as rows and columns. The first use computes its index vectors."""
        return Table(self.source, self.recipe, self.maps, self.strategy, self.dtype)

    def fresh(self) -> GrownTensor:
        """The same tensor, without the table of this one, which may hold megabytes."""
        return GrownTensor(self.source, self.recipe, self.maps, self.strategy, self.dtype)

    def stored(self) -> Array:
        """The whole tensor as a file stores it, of shape `stored_shape`."""
        array = self.numpy()
        if self.recipe.bits is None:
            return array
        return pack(array, self.recipe.bits).reshape(self.stored_shape)

    def numpy(self) -> Array:
        """The whole tensor, of shape `shape`."""
        return self[()]

    def __getitem__(self, windows: tuple[slice, ...]) -> Array:
        """A slice of the grown tensor.

        Only the part of the source that the slice needs is read. But the first slice of a tensor with noise reads the
        whole source, from which the level of the noise is computed.

        Args:
            windows: a slice with step 1 for each of the leading axes. The other axes are not cut.

        Raises:
            BadModel: the source's file cannot be read, or ends too early.
        """
        full = (*windows, *[slice(None)] * (len(self.shape) - len(windows)))
        return self.table.window(full)

    def pieces(self) -> Iterator[Piece]:
        """The functions that compute the tensor's bytes for a file.

        Workers may call them in any order and at the same time, each with its own `Scratch`.
        """
        return self.table.pieces()

    def as_lazy(self, name: str) -> LazyGrown:
        """This tensor as a tensor of an ONNX graph. It is computed when the graph is written."""
        return LazyGrown(self, name)


class LazyGrown(ir.LazyTensor):
    """A grown tensor in a graph.

    The writers of this package stream `grown`. Any other user of the graph gets the whole tensor.
    """

    def __init__(self, grown: GrownTensor, name: str) -> None:
        self.grown = grown
        super().__init__(
            lambda: ir.Tensor(grown.fresh().stored(), dtype=grown.dtype, name=name),
            dtype=grown.dtype,
            shape=ir.Shape(grown.stored_shape),
            name=name,
        )
