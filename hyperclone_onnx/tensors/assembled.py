"""Builds the tensor that a recipe grows: one stored tensor, several joined ones, or numbers drawn by a law.

Any bytes of a joined or drawn tensor are computed without the rest of it. So such a tensor is streamed, however large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.plan.origins import Drawn, Joined, Origin
from hyperclone_onnx.tensors.noise import draw, key_of
from hyperclone_onnx.tensors.scratch import Scratch

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


def assemble(origin: Origin, source: ir.Model) -> ir.TensorProtocol:
    """Build the tensor that an origin describes.

    Args:
        origin: one stored tensor, a join of several, or a law.
        source: the model that has the stored tensors.

    Raises:
        KeyError: the model has no tensor of a name in `origin`.
        ValueError: the shapes or the types of the tensors do not allow the join.
    """
    stored = source.graph.initializers

    def tensor(name: str) -> ir.TensorProtocol:
        value = stored[name].const_value
        assert value is not None
        return value

    if isinstance(origin, str):
        return tensor(origin)
    if isinstance(origin, Drawn):
        return DrawnTensor(origin)
    return JoinedTensor(origin, [tensor(name) for name in origin.sources])


class JoinedTensor(ir.LazyTensor):
    """Several tensors, joined into one.

    Its bytes are runs of the bytes of the parts. For each index of the axes in front of the join's axis, there is one
    run of each part, in the order of the parts.

    Args:
        joined: the axis, and the names of the parts.
        parts: the tensors to join, in the order of the names.

    Raises:
        ValueError: the shapes or the types of the parts do not allow it.
    """

    def __init__(self, joined: Joined, parts: Sequence[ir.TensorProtocol]) -> None:
        shapes = [tuple(map(int, part.shape.numpy())) for part in parts]
        kinds = {part.dtype for part in parts}
        if len(kinds) > 1:
            raise ValueError(f"tensors of the types {', '.join(sorted(kind.name for kind in kinds))} cannot be joined")
        shape = joined.shape(dict(zip(joined.sources, shapes, strict=True)))
        self.parts = list(parts)
        self.before = math.prod(shape[: joined.axis])
        self.runs = [part.nbytes // max(self.before, 1) for part in parts]
        """The number of bytes in a run, for each part."""
        self.has_whole_runs = all(
            math.prod(part_shape[joined.axis :]) * part.dtype.bitwidth % 8 == 0
            for part_shape, part in zip(shapes, parts, strict=True)
        )
        """Whether every run fills whole bytes."""
        join = np.stack if joined.stacked else np.concatenate
        super().__init__(
            lambda: ir.Tensor(join([part.numpy() for part in parts], axis=joined.axis), dtype=parts[0].dtype),
            dtype=parts[0].dtype,
            shape=ir.Shape(shape),
            name="+".join(joined.sources),
        )

    def places(self, start: int, count: int) -> list[tuple[int, int, int]]:
        """Where bytes [start, start + count) lie: (number of the part, offset in the part, number of bytes)."""
        row_size = sum(self.runs)
        places: list[tuple[int, int, int]] = []
        while count:
            row, offset = divmod(start, row_size)
            part = 0
            while offset >= self.runs[part]:
                offset -= self.runs[part]
                part += 1
            size = min(count, self.runs[part] - offset)
            places.append((part, row * self.runs[part] + offset, size))
            start, count = start + size, count - size
        return places


class DrawnTensor(ir.LazyTensor):
    """Numbers drawn by a law. An element depends only on the name, the seed and its place (see `noise`)."""

    def __init__(self, drawn: Drawn) -> None:
        self.drawn = drawn
        dtype = ir.DataType[drawn.dtype]
        self.kind = np.dtype(dtype.numpy())
        super().__init__(
            lambda: ir.Tensor(self.elements(0, math.prod(drawn.shape), Scratch()).reshape(drawn.shape), dtype=dtype),
            dtype=dtype,
            shape=ir.Shape(drawn.shape),
            name=drawn.name,
        )

    def elements(self, start: int, count: int, scratch: Scratch) -> Array:
        """Elements [start, start + count) in row-major order, shape (count,)."""
        if self.drawn.law == "constant":
            return np.full(count, self.drawn.scale).astype(self.kind)
        width = int(self.drawn.shape[-1]) if self.drawn.shape else 1
        key = key_of(self.drawn.name, self.drawn.seed, 0)
        first, last = start // max(width, 1), -(-(start + count) // max(width, 1))
        rows = draw(key, width, (first, last - first), (0, width), scratch)
        skip = start - first * width
        return (rows.reshape(-1)[skip : skip + count].astype(np.float64) * self.drawn.scale).astype(self.kind)
