"""The source's initializers, of which a grown file is made: read from the source's file, or added up again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel, BadRequest
from hyperclone_onnx.graphs import eps_of
from hyperclone_onnx.plan.maps import AxisIndex, Indices, index_kept
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.reading import loading
from hyperclone_onnx.tensors.grown_tensor import GrownTensor
from hyperclone_onnx.transforms.source import source_of

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Grown:
    """A grown file: its plan, its floating initializers, and how to see the source in them."""

    path: Path
    plan: Plan
    tensors: Mapping[str, ir.TensorProtocol]
    """The floating initializers, by name; read when they are used."""
    order: tuple[str, ...] = ()
    """The initializers' names in the order in which the graph uses them."""
    _axes: dict[str, tuple[AxisIndex, ...]] = field(default_factory=dict, repr=False, compare=False)

    def recipe(self, name: str) -> Recipe | None:
        """How an initializer was made; None where it is the source's own."""
        return self.plan.tensors.get(name)

    def axis(self, name: str, axis: int) -> Indices:
        """The source index of each index of one axis, axes of size one not counted."""
        return self.axes(name)[axis].source

    def shared(self, name: str) -> int:
        """How many repeats divide the weight among them."""
        return int(np.prod([int(each.count.max(initial=1)) for each in self.axes(name)], dtype=np.int64))

    def axes(self, name: str) -> tuple[AxisIndex, ...]:
        """The axes of an initializer, those of size one not counted."""
        if name not in self._axes:
            self._axes[name] = self._indexed(name)
        return self._axes[name]

    def _indexed(self, name: str) -> tuple[AxisIndex, ...]:
        recipe = self.recipe(name)
        if recipe is None:
            shape = [int(size) for size in self.tensors[name].shape.numpy()]
            return tuple(index_kept(size) for size in shape if size != 1)
        return tuple(each for each in recipe.index(self.plan.maps) if each.source_size != 1)

    def remade(self, name: str, source: Array) -> Array:
        """The initializer made afresh from its source tensor."""
        recipe, stored = self.recipe(name), self.tensors[name]
        if recipe is None:
            return source
        maps = self.plan.maps
        shape = recipe.source_shape(maps)
        array = np.ascontiguousarray(source.astype(stored.dtype.numpy())).reshape(shape)
        return GrownTensor(ir.Tensor(array, dtype=stored.dtype), recipe, maps, self.plan.strategy).numpy()


def read_grown(path: Path) -> Grown:
    """Read a grown file.

    Raises:
        BadModel: it cannot be read.
        BadRequest: it carries no plan.
    """
    model = loading.load(path)
    plan = Plan.carried_by(model.metadata_props)
    if plan is None:
        raise BadRequest(f"{path}: it carries no plan: only a file that hyperclone-onnx grew can be handed to hf")
    stored = {
        name: value.const_value for name, value in model.graph.initializers.items() if value.const_value is not None
    }
    missing = next((name for name in plan.tensors if name not in stored), None)
    if missing is not None:
        raise BadModel(f"{path}: it has no tensor {missing!r}, which its plan names")
    floating = {name: each for name, each in stored.items() if each.dtype.is_floating_point()}
    order = dict.fromkeys(each.name for node in model.graph.all_nodes() for each in node.inputs if each is not None)
    return Grown(path, plan, floating, tuple(name for name in order if name in floating))


@dataclass(frozen=True)
class Source:
    """One initializer as the source has it, in float32 or its own wider type, and how exactly it is known."""

    array: Array
    tolerance: float
    """The largest difference that rounding explains, absolute."""


def from_file(grown: Grown, path: Path) -> dict[str, Source]:
    """The source of each initializer, from the source's own file.

    Raises:
        BadModel: the file cannot be read, or is not what the plan was made from.
    """
    stored = source_of(path, grown.plan.transforms).model.graph.initializers
    found = {}
    for name in grown.tensors:
        recipe = grown.recipe(name)
        value = stored.get(recipe.source if recipe is not None else name)
        if value is None or value.const_value is None:
            if recipe is not None:
                raise BadModel(f"{path}: it has no tensor {recipe.source!r}: {grown.path} was not grown from it")
            continue
        array = _wide(value.const_value.numpy())
        if recipe is not None and squeezed_shape(array) != tuple(each.source_size for each in grown.axes(name)):
            raise BadModel(
                f"{path}: its tensor {recipe.source!r} is of another size: {grown.path} was not grown from it"
            )
        found[name] = Source(array, eps_of(value.const_value.dtype) * _largest(array))
    return found


def squeezed_shape(array: Array) -> tuple[int, ...]:
    """The shape without its ones."""
    return tuple(size for size in array.shape if size != 1)


def added_up(grown: Grown) -> tuple[dict[str, Source], list[str]]:
    """The source of each initializer as its repeats add up, and those whose repeats contradict one another.

    Where repeats that were copies differ, the file has been trained: it does not hold its source any more.
    """
    found, torn = {}, []
    for name, tensor in grown.tensors.items():
        recipe = grown.recipe(name)
        array = tensor.numpy()
        if recipe is None:
            found[name] = Source(_wide(array), eps_of(tensor.dtype) * _largest(array))
            continue
        source, error = _collapsed(grown, name, array, recipe)
        tolerance = 4 * grown.shared(name) * eps_of(tensor.dtype) * _largest(array) / abs(recipe.scale)
        if not error <= tolerance:
            torn.append(name)
        found[name] = Source(source, tolerance)
    return found, torn


def _collapsed(grown: Grown, name: str, array: Array, recipe: Recipe) -> tuple[Array, float]:
    """The source tensor, and how far copies of it are from one another."""
    axes = grown.axes(name)
    total = np.asarray(array, dtype=np.float64).reshape([each.grown for each in axes])
    for axis, index in enumerate(axes):
        if index.collapsed_size != index.grown:
            moved = np.moveaxis(total, axis, 0)
            total = np.moveaxis(_added(moved, index), 0, axis)
    error = 0.0
    for axis, index in enumerate(axes):
        if index.source_size == index.collapsed_size:
            continue
        of_collapsed = np.empty(index.collapsed_size, dtype=np.int64)
        of_collapsed[index.collapsed] = index.source
        first = np.unique(of_collapsed, return_index=True)[1]
        kept = np.take(total, first, axis=axis)
        error = max(error, _largest(np.take(kept, of_collapsed, axis=axis) - total))
        total = kept
    return _narrow(total / recipe.scale, array), error / abs(recipe.scale)


def _added(array: Array, index: AxisIndex) -> Array:
    """The sums over the repeats of each index of the first axis."""
    counts = np.bincount(index.collapsed, minlength=index.collapsed_size)
    starts = np.cumsum(counts) - counts
    order = np.argsort(index.collapsed, kind="stable")
    total = array[order[starts]].copy()
    for repeat in range(1, int(counts.max(initial=1))):
        some = np.flatnonzero(counts > repeat)
        total[some] += array[order[starts[some] + repeat]]
    return np.asarray(total)


def _narrow(total: Array, like: Array) -> Array:
    return total if like.dtype == np.float64 else total.astype(np.float32)


def _wide(array: Array) -> Array:
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def _largest(array: Array) -> float:
    return float(np.abs(array).max(initial=0.0))
