"""How every tensor of a grown checkpoint is made.

A tensor is made from the initializers of the grown file. A tensor that the file does not have is made by repeating the
source checkpoint's elements.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import StoredArray, values
from hyperclone_onnx.frameworks.hugging_face.checkpoint import Checkpoint, Loaded, stored_tensors, to_numpy
from hyperclone_onnx.frameworks.hugging_face.layout import LaidOut, Layout, grown_shape, laid_out, put_back
from hyperclone_onnx.frameworks.hugging_face.matching import Matches, constant
from hyperclone_onnx.frameworks.hugging_face.sources import Grown, Source
from hyperclone_onnx.frameworks.hugging_face.streaming import in_float, open_model
from hyperclone_onnx.plan.maps import Indices
from hyperclone_onnx.plan.strategies import Strategy

Array = npt.NDArray[Any]

EVEN = Strategy("symmetric")
"""Divides a weight evenly. The activations of a grown model are the same with every strategy; this one has no noise."""


@dataclass
class Given:
    """The source checkpoint's model and its tensors by name. Tensors that the checkpoint lacks are not among them."""

    loaded: Loaded
    floating: dict[str, Array | StoredArray]
    """Floating tensors, in float32 or float64. A stored array is read, and widened, each time it is used."""
    others: dict[str, Array]
    """Tensors of integers or booleans. The grown checkpoint has them unchanged."""
    names: list[str]
    """The names of all these tensors, in the model's order."""

    @staticmethod
    def read(checkpoint: Checkpoint) -> Given:
        """Load a checkpoint. Parameters of the model that it lacks become zero.

        Raises:
            BadModel: the weights cannot be read, or do not fit the configuration.
        """
        loaded = open_model(checkpoint)
        tensors = loaded.tensors()
        if loaded.stored is not None:
            stored = {name: loaded.stored[name] for name in tensors}
            plain = {name for name, array in stored.items() if array.dtype.kind in "iub"}
            return Given(
                loaded,
                {name: _widened(array) for name, array in stored.items() if name not in plain},
                {name: stored[name]() for name in tensors if name in plain},
                list(tensors),
            )
        floating = {name: to_numpy(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
        others = {name: tensor.numpy() for name, tensor in tensors.items() if not tensor.is_floating_point()}
        # measuring.py overwrites constant tensors of the model with noise. The arrays here must not change with them.
        kept = {name: array.copy() if constant(array) else array for name, array in floating.items()}
        for name in loaded.missing:
            zero(loaded.model, name)
        return Given(loaded, {**kept}, others, list(tensors))

    @property
    def model(self) -> Any:
        """The model in memory; None after `release`."""
        return self.loaded.model

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every stored tensor of the model, including those that the checkpoint lacks."""
        return {name: tuple(tensor.shape) for name, tensor in stored_tensors(self.model).items()}

    def held(self) -> dict[str, Array]:
        """The floating tensors in memory, all of them."""
        return {name: values(array) for name, array in self.floating.items()}

    def release(self) -> None:
        """Free the model's memory. The arrays in `floating` and `others` stay."""
        self.loaded = Loaded(None, self.loaded.missing)
        gc.collect()


def zero(model: Any, name: str) -> None:
    """Set a stored tensor of a model to zero.

    transformers draws tensors that a checkpoint lacks at random. Two models can only be compared if such tensors are
    the same in both.
    """
    tensor = stored_tensors(model).get(name)
    if tensor is not None:
        with torch.no_grad():
            tensor.zero_()


def _widened(array: StoredArray) -> StoredArray:
    """A stored array of floating numbers in float32, or in float64 if that is its type."""
    if array.dtype in (np.float32, np.float64):
        return array
    return StoredArray(array.shape, np.dtype(np.float32), lambda: np.asarray(in_float(array()).numpy()))


@dataclass(frozen=True)
class Repeated:
    """A tensor that is not in the file: the source checkpoint's tensor, repeated along its axes."""

    array: Array | StoredArray
    orders: tuple[Indices | None, ...]
    """For each axis the source index of each new index; None where the axis keeps its size."""

    def made(self, factor: float = 1.0, offset: float = 0.0) -> Array:
        """``(tensor + offset) * factor - offset``, repeated."""
        array = values(self.array)
        for axis, order in enumerate(self.orders):
            array = array if order is None else np.take(array, order, axis=axis)
        return array if factor == 1.0 else ((array + offset) * factor - offset).astype(array.dtype)

    @property
    def grows(self) -> bool:
        """Whether any axis grows."""
        return any(order is not None for order in self.orders)


@dataclass(frozen=True, eq=False)
class Assembly:
    """How every tensor of the grown checkpoint is made."""

    grown: Grown
    given: Given
    layouts: dict[str, Layout]
    """Tensors that are made from initializers, by name."""
    repeated: dict[str, Repeated]
    """Tensors that are not in the file, by name."""
    also: dict[str, tuple[str, Layout]]
    """Initializers from which no tensor is made, with the tensor and the layout to read them back from.

    The file stores such a tensor twice (a tied embedding, for example), and the checkpoint stores it once.
    """
    orders: dict[tuple[int, int], Indices]
    """For sizes before and after: the source index of each index, as most grown axes of these sizes have it. It is the
    size before where an index is no copy."""

    def scales(self) -> dict[str, float]:
        """The number by which growth multiplies the elements of each tensor that is made from initializers.

        For a tensor made of several pieces it is the number of the first piece.
        """
        scales: dict[str, float] = {}
        for name, layout in self.layouts.items():
            initializer = layout.pieces[0].initializer
            recipe = self.grown.recipe(initializer)
            scales[name] = (1.0 if recipe is None else abs(recipe.scale)) / self.grown.shared(initializer)
        return scales

    @cached_property
    def makers(self) -> dict[str, list[tuple[str, Layout]]]:
        """For each initializer the tensors that are made from it, with their layouts."""
        makers: dict[str, list[tuple[str, Layout]]] = {}
        for name, layout in self.layouts.items():
            for piece in layout.pieces:
                makers.setdefault(piece.initializer, []).append((name, layout))
        return makers

    def source(
        self, initializer: str, stored: Mapping[str, Source], tensors: Mapping[str, Array | StoredArray]
    ) -> Array:
        """An initializer of the source, in float32 or float64, with the numbers that the checkpoint's tensors have.

        The file may have rounded these numbers, or their shares.
        """

        def whole(initializer: str, axis: int) -> Indices:
            return np.arange(self.grown.axes(initializer)[axis].source_size, dtype=np.int64)

        array = np.array(stored[initializer].array)
        for name, layout in self.makers[initializer]:
            put_back(layout, values(tensors[name]).astype(array.dtype, copy=False), initializer, array, whole)
        return array

    def written(self, layout: Layout, stored: Mapping[str, Source], dtype: np.dtype[Any], trained: bool) -> LaidOut:
        """A tensor that is made from initializers, in the given type.

        An untrained file of another type is not cast: we divide the source's weights anew in the wanted type, because
        the shares must add up in this type.
        """

        def read(initializer: str) -> Array:
            tensor = self.grown.tensors[initializer]
            if trained or tensor.dtype.numpy() == dtype:
                return np.asarray(tensor.numpy().astype(dtype, copy=False))
            array = self.source(initializer, stored, self.given.floating)
            return self.grown.remade(initializer, array, ir.DataType.from_numpy(dtype))

        return LaidOut(layout, read, self.grown.axis, dtype)

    def fresh(
        self, stored: Mapping[str, Source], tensors: Mapping[str, Array | StoredArray]
    ) -> dict[str, Callable[[], Array]]:
        """Functions that make each tensor of the grown checkpoint afresh, without training and compensation.

        Args:
            stored: the initializers as the source has them.
            tensors: the tensors to grow in place of the checkpoint's, by name.
        """

        def remade(initializer: str) -> Array:
            array = self.source(initializer, stored, tensors)
            return self.grown.remade(initializer, array, ir.DataType.from_numpy(array.dtype), EVEN)

        return {
            **{
                name: lambda layout=layout: laid_out(layout, remade, self.grown.axis)  # type: ignore[misc]
                for name, layout in self.layouts.items()
            },
            **{
                name: lambda name=name, repeated=repeated: replace(repeated, array=tensors[name]).made()  # type: ignore[misc]
                for name, repeated in self.repeated.items()
            },
            **{name: lambda array=array: array for name, array in self.given.others.items()},  # type: ignore[misc]
        }


class Chooser:
    """Chooses, for each checkpoint tensor, one of the layouts that fit its content.

    Args:
        grown: the grown file.
        given: the source's checkpoint.
        matches: the layouts that fit the content of each tensor.
    """

    def __init__(self, grown: Grown, given: Given, matches: Matches) -> None:
        self.grown = grown
        self.given = given
        self.matches = matches
        self.orders = _orders(grown, matches)

    def certain(self) -> dict[str, tuple[int, ...]]:
        """The grown shapes of those tensors for which all layouts make the same shape."""
        certain = {}
        for name, layouts in self.matches.layouts.items():
            shapes = {grown_shape(layout, self.grown.axis) for layout in layouts}
            if len(shapes) == 1:
                certain[name] = next(iter(shapes))
        return certain

    @property
    def doubtful(self) -> frozenset[str]:
        """The tensors that more than one layout fits."""
        return frozenset(name for name, layouts in self.matches.layouts.items() if len(layouts) > 1)

    def assembled(self, shapes: Mapping[str, tuple[int, ...]]) -> Assembly:
        """How every tensor is made, with the first layout for each that makes the wanted shape.

        Args:
            shapes: the shape of each tensor in the model that the grown configuration builds.

        Raises:
            Refused: no layout makes a tensor's wanted shape, and no other axis grew from its size to the wanted size,
                so that the order of repeats is unknown.
        """
        layouts: dict[str, Layout] = {}
        repeated: dict[str, Repeated] = {}
        for name, array in self.given.floating.items():
            wanted = shapes[name]
            fitting = [
                layout
                for layout in self.matches.layouts.get(name, ())
                if grown_shape(layout, self.grown.axis) == wanted
            ]
            if fitting:
                layouts[name] = fitting[0]
            else:
                repeated[name] = Repeated(array, self._orders_of(name, array.shape, wanted))
        return Assembly(self.grown, self.given, layouts, repeated, self._also(layouts), self.orders)

    def _orders_of(self, name: str, before: Sequence[int], after: Sequence[int]) -> tuple[Indices | None, ...]:
        """The order of repeats along each axis of a tensor that is not in the file."""
        orders = []
        for old, new in zip(before, after, strict=True):
            order = self.orders.get((old, new))
            if old != new and (order is None or order.max(initial=0) >= old):
                raise Refused(
                    f"{name} is not in {self.grown.path}, so it is unknown how its axis of {old} becomes {new}"
                )
            orders.append(order if old != new else None)
        return tuple(orders)

    def _stretches(self, initializer: str) -> list[bytes | None]:
        """The stretch of each axis of an initializer."""
        axes = self.grown.axes(initializer)
        return [None if axis.stretch is None else axis.stretch.tobytes() for axis in axes]

    def _also(self, layouts: Mapping[str, Layout]) -> dict[str, tuple[str, Layout]]:
        """`Assembly.also` for the chosen layouts."""
        used = {piece.initializer for layout in layouts.values() for piece in layout.pieces}
        unused: dict[str, tuple[str, Layout]] = {}
        for name, candidates in self.matches.layouts.items():
            for candidate in candidates:
                initializer = candidate.pieces[0].initializer
                if len(candidate.pieces) == 1 and name in layouts and initializer not in used | unused.keys():
                    first = layouts[name].pieces[0].initializer
                    if self._stretches(initializer) != self._stretches(first):
                        raise Refused(
                            f"{name} is {first!r} and {initializer!r} in {self.grown.path}, which the width of the "
                            "residual stream stretches differently: no one tensor of a checkpoint is both"
                        )
                    # Both have the source's content, but growth may divide the two among different numbers of repeats.
                    shares = self.grown.shared(initializer) / self.grown.shared(first)
                    unused[initializer] = name, candidate.scaled(shares)
        return unused


def _orders(grown: Grown, matches: Matches) -> dict[tuple[int, int], Indices]:
    """For each pair of sizes before and after: the order of repeats that most axes with these sizes have."""
    seen: dict[tuple[int, int], Counter[bytes]] = {}
    kept: dict[bytes, Indices] = {}
    for layouts in matches.layouts.values():
        for piece in layouts[0].pieces:
            for axis in grown.axes(piece.initializer):
                if axis.grown != axis.source_size:
                    key = axis.source.tobytes()
                    kept[key] = axis.source
                    seen.setdefault((axis.source_size, axis.grown), Counter())[key] += 1
    return {sizes: kept[counter.most_common(1)[0][0]] for sizes, counter in seen.items()}
