"""The recipe of a grown tensor: the origin of its numbers, and how its axes repeat and share them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.plan.maps import (
    Axis,
    AxisIndex,
    Kept,
    Maps,
    axis_from_json,
    axis_to_json,
    has_power,
    index_axis,
    source_size,
)
from hyperclone_onnx.plan.origins import Origin, noise_name, origin_from_json, origin_to_json, sources_of


@dataclass(frozen=True)
class Recipe:
    """How one grown tensor is computed.

    Args:
        origin: the origin of the numbers, most often the name of one stored tensor.
        axes: for each axis, its factors, outermost first. A factor may have a power of its map's stretch.
        shared: the (axis, factor) pairs whose repeats divide the weight among themselves. All other repeats copy it.
        scale: a number that multiplies the result.
        bits: the number of bits of a number, if the stored tensor packs several numbers in a byte. `axes` are then
            the axes of the numbers, not of the bytes.
    """

    origin: Origin
    axes: tuple[tuple[Axis, ...], ...]
    shared: tuple[tuple[int, int], ...] = ()
    scale: float = 1.0
    bits: int | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the stored tensors that the recipe reads: one, several, or none."""
        return sources_of(self.origin)

    @property
    def source(self) -> str:
        """The name of the one stored tensor that the recipe reads.

        Raises:
            Refused: the recipe reads several tensors, or none.
        """
        if isinstance(self.origin, str):
            return self.origin
        text = f"is made of {', '.join(self.sources)}" if self.sources else "is drawn by a law"
        raise Refused(f"a tensor that {text} does not have exactly one source tensor, which this operation needs")

    @property
    def noise_name(self) -> str:
        """The name that decides the noise of the tensor."""
        return noise_name(self.origin)

    @property
    def grows(self) -> bool:
        """Whether any axis differs from the source's."""
        return any(not isinstance(factor, Kept) for axis in self.axes for factor in axis)

    @property
    def is_stretched(self) -> bool:
        """Whether the numbers along any axis are multiplied by a power of its map's stretch."""
        return any(has_power(factor) for axis in self.axes for factor in axis)

    @property
    def is_trivial(self) -> bool:
        """Whether the grown tensor equals the stored one."""
        return isinstance(self.origin, str) and not self.grows and self.scale == 1.0

    def index(self, maps: Maps) -> tuple[AxisIndex, ...]:
        """The index vectors of each axis.

        Raises:
            KeyError: a dimension has no map.
        """
        shared = set(self.shared)
        return tuple(
            index_axis([(factor, (number, position) in shared) for position, factor in enumerate(axis)], maps)
            for number, axis in enumerate(self.axes)
        )

    def source_shape(self, maps: Maps) -> tuple[int, ...]:
        """The shape of the tensor that is grown."""
        return tuple(math.prod(source_size(factor, maps) for factor in axis) for axis in self.axes)

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain data."""
        data: dict[str, Any] = {
            **origin_to_json(self.origin),
            "axes": [[axis_to_json(factor) for factor in axis] for axis in self.axes],
        }
        if self.shared:
            data["shared"] = [list(pair) for pair in self.shared]
        if self.scale != 1.0:
            data["scale"] = self.scale
        if self.bits is not None:
            data["bits"] = self.bits
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_json`."""
        return Recipe(
            origin_from_json(data),
            tuple(tuple(axis_from_json(factor) for factor in axis) for axis in data["axes"]),
            tuple((axis, factor) for axis, factor in data.get("shared", ())),
            data.get("scale", 1.0),
            data.get("bits"),
        )
