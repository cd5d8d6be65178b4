"""How every tensor of a grown checkpoint is made: from initializers, or, where the file has none, by repetition."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.frameworks.hugging_face.checkpoint import Checkpoint, Loaded, stored_tensors, to_numpy
from hyperclone_onnx.frameworks.hugging_face.layout import Layout, grown_shape, laid_out, put_back
from hyperclone_onnx.frameworks.hugging_face.matching import Matches, constant
from hyperclone_onnx.frameworks.hugging_face.sources import Grown, Source
from hyperclone_onnx.plan.maps import Indices

Array = npt.NDArray[Any]


@dataclass
class Given:
    """The source's model and its tensors."""

    loaded: Loaded
    floating: dict[str, Array]
    others: dict[str, Array]
    """Tensors that are no floating ones: they are taken over."""
    types: dict[str, str]
    names: list[str]

    @staticmethod
    def read(checkpoint: Checkpoint) -> Given:
        """Load a checkpoint; what it lacks is zero."""
        loaded = checkpoint.load()
        tensors = loaded.tensors()
        types = {name: str(each.dtype).removeprefix("torch.") for name, each in tensors.items()}
        floating = {name: to_numpy(each) for name, each in tensors.items() if each.is_floating_point()}
        others = {name: each.numpy() for name, each in tensors.items() if not each.is_floating_point()}
        # What is noise in the model for a while (measuring.py) must stay here what it is.
        floating = {name: array.copy() if constant(array) else array for name, array in floating.items()}
        for name in loaded.missing:
            zero(loaded.model, name)
        return Given(loaded, floating, others, types, list(tensors))

    @property
    def model(self) -> Any:
        """The model in memory, until it is released."""
        return self.loaded.model

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every stored tensor of the model, those that the checkpoint lacks too."""
        return {name: tuple(each.shape) for name, each in stored_tensors(self.model).items()}

    def release(self) -> None:
        """Let go of the model: its tensors stay."""
        self.loaded = Loaded(None, self.loaded.missing)
        gc.collect()


def zero(model: Any, name: str) -> None:
    """What a checkpoint lacks is drawn at random each time: zeros are the same in source and grown model."""
    found = stored_tensors(model).get(name)
    if found is not None:
        with torch.no_grad():
            found.zero_()


@dataclass(frozen=True)
class Repeated:
    """A tensor that is not in the file: the source's own, repeated along its axes."""

    array: Array
    orders: tuple[Indices | None, ...]

    def made(self, factor: float = 1.0, offset: float = 0.0) -> Array:
        """``(tensor + offset) * factor - offset``, repeated."""
        array = self.array
        for axis, order in enumerate(self.orders):
            array = array if order is None else np.take(array, order, axis=axis)
        return array if factor == 1.0 else ((array + offset) * factor - offset).astype(array.dtype)

    @property
    def grows(self) -> bool:
        """Whether it is repeated at all."""
        return any(order is not None for order in self.orders)


@dataclass(frozen=True)
class Assembly:
    """How every tensor of the grown checkpoint is made."""

    grown: Grown
    given: Given
    layouts: dict[str, Layout]
    repeated: dict[str, Repeated]
    also: dict[str, tuple[str, Layout]]
    """Initializers that no tensor is made from, and the tensor and layout that they can be read back from."""
    orders: dict[tuple[int, int], Indices]

    def scales(self) -> dict[str, float]:
        """What growth multiplies each tensor by, where one number says it."""
        found: dict[str, float] = {}
        for name, layout in self.layouts.items():
            initializer = layout.pieces[0].initializer
            recipe = self.grown.recipe(initializer)
            found[name] = (1.0 if recipe is None else abs(recipe.scale)) / self.grown.shared(initializer)
        return found

    def fresh(self, stored: Mapping[str, Source], tensors: Mapping[str, Array]) -> dict[str, Callable[[], Array]]:
        """Each tensor as growth alone makes it, in float32, were the checkpoint's tensors the ones given.

        Args:
            stored: the initializers as the source has them.
            tensors: what the checkpoint's tensors are to be taken for.
        """
        makers: dict[str, list[tuple[str, Layout]]] = {}
        for name, layout in self.layouts.items():
            for piece in layout.pieces:
                makers.setdefault(piece.initializer, []).append((name, layout))

        def source(initializer: str, axis: int) -> Indices:
            return np.arange(self.grown.axes(initializer)[axis].source_size, dtype=np.int64)

        def remade(initializer: str) -> Array:
            array = np.array(stored[initializer].array)
            for name, layout in makers[initializer]:
                if tensors[name] is not self.given.floating[name]:
                    put_back(layout, tensors[name].astype(array.dtype), initializer, array, source)
            return self.grown.remade(initializer, array)

        return {
            **{
                name: lambda layout=layout: laid_out(layout, remade, self.grown.axis)  # type: ignore[misc]
                for name, layout in self.layouts.items()
            },
            **{
                name: lambda name=name, each=each: replace(each, array=tensors[name]).made()  # type: ignore[misc]
                for name, each in self.repeated.items()
            },
            **{name: lambda array=array: array for name, array in self.given.others.items()},  # type: ignore[misc]
        }


class Chooser:
    """Chooses, for each checkpoint tensor, one of the layouts that fit its content."""

    def __init__(self, grown: Grown, given: Given, matches: Matches) -> None:
        self.grown = grown
        self.given = given
        self.matches = matches
        self.orders = _orders(grown, matches)

    def certain(self) -> dict[str, tuple[int, ...]]:
        """The grown shapes of the tensors for which all layouts agree on it."""
        found = {}
        for name, layouts in self.matches.layouts.items():
            shapes = {grown_shape(each, self.grown.axis) for each in layouts}
            if len(shapes) == 1:
                found[name] = next(iter(shapes))
        return found

    @property
    def doubtful(self) -> frozenset[str]:
        """The tensors that several initializers are equal to."""
        return frozenset(name for name, layouts in self.matches.layouts.items() if len(layouts) > 1)

    def assembled(self, shapes: Mapping[str, tuple[int, ...]]) -> Assembly:
        """Everything, with the shapes that the configuration asks for.

        Raises:
            Refused: a tensor that is not in the file would have to grow in a way that nothing tells.
        """
        layouts: dict[str, Layout] = {}
        repeated: dict[str, Repeated] = {}
        for name, array in self.given.floating.items():
            wanted = shapes[name]
            fitting = [
                each for each in self.matches.layouts.get(name, ()) if grown_shape(each, self.grown.axis) == wanted
            ]
            if fitting:
                layouts[name] = fitting[0]
            else:
                repeated[name] = Repeated(array, self._orders_of(name, array.shape, wanted))
        return Assembly(self.grown, self.given, layouts, repeated, self._also(layouts), self.orders)

    def _orders_of(self, name: str, before: Sequence[int], after: Sequence[int]) -> tuple[Indices | None, ...]:
        found = []
        for old, new in zip(before, after, strict=True):
            order = self.orders.get((old, new))
            if old != new and order is None:
                raise Refused(f"{name} is not in {self.grown.path}, and nothing tells how its {old} become {new}")
            found.append(order if old != new else None)
        return tuple(found)

    def _also(self, layouts: Mapping[str, Layout]) -> dict[str, tuple[str, Layout]]:
        used = {piece.initializer for each in layouts.values() for piece in each.pieces}
        found: dict[str, tuple[str, Layout]] = {}
        for name, candidates in self.matches.layouts.items():
            for each in candidates:
                initializer = each.pieces[0].initializer
                if len(each.pieces) == 1 and name in layouts and initializer not in used | found.keys():
                    shares = self.grown.shared(initializer) / self.grown.shared(layouts[name].pieces[0].initializer)
                    found[initializer] = name, each.scaled(shares)
        return found


def _orders(grown: Grown, matches: Matches) -> dict[tuple[int, int], Indices]:
    """For sizes before and after, the order of repeats that most axes of such sizes have."""
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
