"""The origin of a grown tensor's numbers: one stored tensor, several joined ones, or a law and a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Law = Literal["normal", "constant"]


@dataclass(frozen=True)
class Joined:
    """Several stored tensors, joined into one: concatenated along an axis, or stacked along a new axis.

    Tensors that are concatenated may differ in the size of that axis only. Tensors that are stacked have one shape.

    Raises:
        ValueError: there is no source, or the axis is negative.
    """

    sources: tuple[str, ...]
    axis: int
    stacked: bool = False

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("at least one tensor must be joined")
        if self.axis < 0:
            raise ValueError(f"the axis of a join is counted from the front, not {self.axis}")

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the joined tensor, from the shapes of its sources.

        Raises:
            ValueError: the shapes do not allow this join.
        """
        first, *rest = [shapes[name] for name in self.sources]
        axis, kept = self.axis, 0 if self.stacked else 1
        if axis + kept > len(first) or any(
            (*shape[:axis], *shape[axis + kept :]) != (*first[:axis], *first[axis + kept :]) for shape in rest
        ):
            raise ValueError(f"tensors of the shapes {[first, *rest]} cannot be joined along axis {axis}")
        length = len(self.sources) if self.stacked else sum(shapes[name][axis] for name in self.sources)
        return (*first[:axis], length, *first[axis + kept :])

    def to_json(self) -> dict[str, Any]:
        """The join as plain data."""
        return {"join": "stack" if self.stacked else "concat", "axis": self.axis, "sources": list(self.sources)}


@dataclass(frozen=True)
class Drawn:
    """Numbers that no stored tensor has: a constant, or normally distributed numbers.

    Args:
        name: decides the numbers, together with the seed. Two drawn tensors need different names.
        shape: the shape of the tensor.
        dtype: the name of its element type in ONNX.
        law: "normal" or "constant".
        scale: the standard deviation, or the constant.
        seed: the seed of normal numbers.

    Raises:
        ValueError: the law is unknown, the scale is not finite, or a size is negative.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    law: Law
    scale: float
    seed: int = 0

    def __post_init__(self) -> None:
        if self.law not in ("normal", "constant"):
            raise ValueError(f"no law {self.law!r}: it is normal or constant")
        if not math.isfinite(self.scale) or any(size < 0 for size in self.shape):
            raise ValueError(f"a drawn tensor of the shape {self.shape} and the scale {self.scale}")

    def to_json(self) -> dict[str, Any]:
        """The law as plain data."""
        return {
            "law": self.law,
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "scale": self.scale,
            "seed": self.seed,
        }


Origin = str | Joined | Drawn
"""A string is the name of one stored tensor."""


def sources_of(origin: Origin) -> tuple[str, ...]:
    """The names of the stored tensors that an origin reads."""
    if isinstance(origin, str):
        return (origin,)
    return origin.sources if isinstance(origin, Joined) else ()


def noise_name(origin: Origin) -> str:
    """The name that decides the noise of a tensor of this origin."""
    if isinstance(origin, str):
        return origin
    return "+".join(origin.sources) if isinstance(origin, Joined) else origin.name


def origin_to_json(origin: Origin) -> dict[str, Any]:
    """The entry of a recipe's JSON for its origin."""
    return {"source": origin} if isinstance(origin, str) else {"origin": origin.to_json()}


def origin_from_json(recipe: Mapping[str, Any]) -> Origin:
    """The inverse of `origin_to_json`."""
    data = recipe.get("origin")
    if data is None:
        return str(recipe["source"])
    if "join" in data:
        return Joined(tuple(data["sources"]), data["axis"], {"stack": True, "concat": False}[data["join"]])
    return Drawn(data["name"], tuple(data["shape"]), data["dtype"], data["law"], data["scale"], data["seed"])
