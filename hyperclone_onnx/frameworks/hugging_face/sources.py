"""The source's initializers, from which a grown file was made.

`from_file` reads them from the source's file. `added_up` computes them from the grown file: the repeats of each tensor
add up to the source's tensor.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel, BadRequest, CannotWrite, Refused
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import StoredArray, values
from hyperclone_onnx.frameworks.hugging_face.layout import squeezed_shape
from hyperclone_onnx.graphs import eps_of
from hyperclone_onnx.plan.maps import AxisIndex, Indices, index_kept
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.plan.strategies import Strategy
from hyperclone_onnx.reading import loading
from hyperclone_onnx.tensors.grown_tensor import GrownTensor
from hyperclone_onnx.transforms.source import source_of

Array = npt.NDArray[Any]

BLOCK = 1 << 22
"""The most elements of a tensor that are added up at a time, where it can be cut along an axis that did not grow."""


@dataclass(frozen=True, eq=False)
class Grown:
    """A grown file: its plan and its floating initializers, with the indices that relate them to the source."""

    path: Path
    plan: Plan
    tensors: Mapping[str, ir.TensorProtocol]
    """The floating initializers by name. Their elements are read when they are used."""
    order: tuple[str, ...] = ()
    """The initializers' names in the order in which the graph uses them."""
    _axes: dict[str, tuple[AxisIndex, ...]] = field(default_factory=dict, repr=False, compare=False)

    def recipe(self, name: str) -> Recipe | None:
        """How an initializer was grown; None where the file has the source's tensor unchanged."""
        return self.plan.tensors.get(name)

    def axis(self, name: str, axis: int) -> Indices:
        """The source index of each index of one axis. Axes of size one are not counted."""
        return self.axes(name)[axis].source

    def shared(self, name: str) -> int:
        """The number of repeats among which the weight is divided; where repeats are unequal, the largest number."""
        return int(np.prod([int(index.count.max(initial=1)) for index in self.axes(name)], dtype=np.int64))

    def axes(self, name: str) -> tuple[AxisIndex, ...]:
        """The indices of each axis of an initializer. Axes of size one are left out.

        Indices that are no copies (of channels that hold a mean, or zero) come last on their axis. Their source index
        is the axis's size in the source.
        """
        if name not in self._axes:
            self._axes[name] = self._indexed(name)
        return self._axes[name]

    def _indexed(self, name: str) -> tuple[AxisIndex, ...]:
        recipe = self.recipe(name)
        if recipe is None:
            shape = [int(size) for size in self.tensors[name].shape.numpy()]
            return tuple(index_kept(size) for size in shape if size != 1)
        maps = self.plan.maps
        indices = [
            replace(index, source_size=size)
            for index, size in zip(recipe.index(maps), recipe.source_shape(maps), strict=True)
        ]
        return tuple(index for index in indices if index.source_size != 1)

    def remade(self, name: str, source: Array, dtype: ir.DataType, strategy: Strategy | None = None) -> Array:
        """The initializer grown afresh from a source tensor, in the given type and by default by the plan's strategy.

        The shares of a weight add up to the weight as this type rounds it.
        """
        recipe = self.recipe(name)
        array = np.ascontiguousarray(source.astype(dtype.numpy()))
        if recipe is None:
            return array
        maps = self.plan.maps
        array = array.reshape(recipe.source_shape(maps))
        return GrownTensor(ir.Tensor(array, dtype=dtype), recipe, maps, strategy or self.plan.strategy_of(name)).numpy()


def read_grown(path: Path) -> Grown:
    """Read a grown file.

    Raises:
        BadModel, BadRequest, Refused: see `grown_from`.
    """
    return grown_from(loading.load(path), path)


def grown_from(model: ir.Model, path: Path) -> Grown:
    """A grown model, from a file or in memory.

    Args:
        model: the model, which carries its plan.
        path: its path, for messages.

    Raises:
        BadModel: the file cannot be read, or lacks a tensor that its plan names.
        BadRequest: the file carries no plan.
        Refused: it has more layers than its source, or norms that no configuration has.
    """
    plan = Plan.carried_by(model.metadata_props)
    if plan is None:
        raise BadRequest(f"{path}: it carries no plan: --to hf needs a file that hyperclone-onnx grew")
    _refuse_weighed(path, plan)
    stored = {
        name: value.const_value for name, value in model.graph.initializers.items() if value.const_value is not None
    }
    missing = next((name for name in plan.tensors if name not in stored), None)
    if missing is not None:
        raise BadModel(f"{path}: it has no tensor {missing!r}, which its plan names")
    floating = {name: tensor for name, tensor in stored.items() if tensor.dtype.is_floating_point()}
    order = dict.fromkeys(value.name for node in model.graph.all_nodes() for value in node.inputs if value is not None)
    return Grown(path, plan, floating, tuple(name for name in order if name in floating))


def _refuse_weighed(path: Path, plan: Plan) -> None:
    """Refuse a file whose norms count each channel of the source once.

    Raises:
        Refused: it has such norms.
    """
    for node, dims in plan.weighed.items():
        raise Refused(
            f"{path}: norms in it count each channel of the source once ({node!r} first, {len(plan.weighed)} in all), "
            f"because {', '.join(dims)} repeats indices unequally. No configuration of transformers can say "
            "this: grow to a multiple, or hand the file to PyTorch, JAX or safetensors"
        )


@dataclass(frozen=True, eq=False)
class Source:
    """One initializer as the source has it, and how exactly we know it."""

    stored: Array | StoredArray
    """In float64 if the file has that type, otherwise in float32. A stored array is read each time it is used."""
    tolerance: float
    """The largest absolute difference that rounding explains."""

    @property
    def array(self) -> Array:
        """The initializer in memory."""
        return values(self.stored)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the initializer."""
        return tuple(self.stored.shape)

    @property
    def size(self) -> int:
        """The number of its elements."""
        return int(self.stored.size)


def from_file(grown: Grown, path: Path) -> dict[str, Source]:
    """The source of each initializer of a grown file, read from the source's file.

    Args:
        grown: the grown file.
        path: the file from which it was grown.

    Raises:
        BadModel: the source's file cannot be read, or the grown file was not grown from it.
    """
    stored = source_of(path, grown.plan.transforms).model.graph.initializers
    read = {}
    for name in grown.tensors:
        recipe = grown.recipe(name)
        value = stored.get(recipe.source if recipe is not None else name)
        if value is None or value.const_value is None:
            if recipe is not None:
                raise BadModel(f"{path}: it has no tensor {recipe.source!r}: {grown.path} was not grown from it")
            continue
        made = _known(value.const_value)
        if recipe is not None and squeezed_shape(made.stored) != tuple(index.source_size for index in grown.axes(name)):
            raise BadModel(f"{path}: its tensor {recipe.source!r} has another size: {grown.path} was not grown from it")
        read[name] = made
    return read


def _known(tensor: ir.TensorProtocol) -> Source:
    """A stored tensor as a source. One that lies in a file stays there."""
    array = _wide(tensor.numpy())
    tolerance = eps_of(tensor.dtype) * _largest(array)
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return Source(array, tolerance)
    return Source(StoredArray(array.shape, array.dtype, lambda: _wide(tensor.numpy())), tolerance)


def small_initializers(path: Path) -> tuple[dict[str, Source], tuple[str, ...]]:
    """The floating initializers of the file from which a deeper model was grown, and their order in its graph.

    Raises:
        BadModel: the file cannot be read.
    """
    graph = source_of(path).model.graph
    tensors = {name: value.const_value for name, value in graph.initializers.items() if value.const_value is not None}
    floating = {name: tensor for name, tensor in tensors.items() if tensor.dtype.is_floating_point()}
    order = dict.fromkeys(value.name for node in graph.all_nodes() for value in node.inputs if value is not None)
    return {name: _known(tensor) for name, tensor in floating.items()}, tuple(
        name for name in order if name in floating
    )


def added_up(grown: Grown, work: Path) -> tuple[dict[str, Source], list[str]]:
    """The source of each initializer as its repeats add up, and the names of initializers whose copies differ.

    If repeats that growth copied differ by more than rounding, the file has been trained. Then its repeats no longer
    add up to the source.

    Args:
        grown: the grown file.
        work: a folder on a disk that can hold the source's tensors. They lie there in a file that has no name any more,
            and do not count as memory that must be kept.

    Raises:
        CannotWrite: the disk is full.
    """
    summed: dict[str, Source] = {}
    torn: list[str] = []
    with tempfile.TemporaryFile(dir=work) as kept:
        for name, tensor in grown.tensors.items():
            recipe = grown.recipe(name)
            array = tensor.numpy()
            if recipe is None:
                summed[name] = Source(_wide(array), eps_of(tensor.dtype) * _largest(array))
                continue
            source, error = collapsed(array, grown.axes(name), recipe.scale)
            tolerance = 4 * grown.shared(name) * eps_of(tensor.dtype) * _largest(array) / abs(recipe.scale)
            if not error <= tolerance:
                torn.append(name)
            summed[name] = Source(_on_disk(source, kept), tolerance)
            del array
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()  # the pages of its file count as memory of the process as long as they are mapped
    return summed, torn


def _on_disk(array: Array, file: Any) -> Array:
    """The same array, in a file that is mapped into memory. A small one stays in memory."""
    if array.nbytes < 1 << 20:
        return array
    try:
        start = file.seek(0, os.SEEK_END)
        start += file.write(b"\0" * (-start % mmap.ALLOCATIONGRANULARITY))
        np.ascontiguousarray(array).tofile(file)
        file.flush()
    except OSError as problem:
        raise CannotWrite(f"the source's tensors cannot be kept on disk ({problem.strerror or problem})") from problem
    return np.memmap(file, array.dtype, "r", start, array.shape)


def collapsed(array: Array, axes: Sequence[AxisIndex], scale: float) -> tuple[Array, float]:
    """The source of a grown tensor, and the largest absolute difference of two copies of one of its elements.

    Repeats that share a weight are added. Of repeats that are copies the first is taken. A large tensor is added up a
    part at a time.

    Args:
        array: the grown tensor. Half precision is added up in float32, other types in float64.
        axes: the indices of its axes. Axes of size one are left out.
        scale: the number by which growth multiplied the tensor.

    Returns:
        The source in float32, or in float64 if that is the type of `array`; and the difference.
    """
    array = array.reshape([index.grown for index in axes])
    whole = next((axis for axis, index in enumerate(axes) if _stays(index)), None)
    if whole is None or array.size <= BLOCK:
        return _collapsed_part(array, axes, scale)
    source = np.empty([index.source_size for index in axes], np.float64 if array.dtype == np.float64 else np.float32)
    length, error = array.shape[whole], 0.0
    step = max(1, BLOCK * length // array.size)
    for start in range(0, length, step):
        part = slice(start, min(start + step, length))
        window = (*[slice(None)] * whole, part)
        some = [index[part] if axis == whole else index for axis, index in enumerate(axes)]
        size = part.stop - part.start
        some[whole] = replace(
            some[whole],
            source_size=size,
            collapsed_size=size,
            source=some[whole].source - start,
            collapsed=some[whole].collapsed - start,
        )
        source[window], more = _collapsed_part(array[window], some, scale)
        error = max(error, more)
    return source, error


def _stays(index: AxisIndex) -> bool:
    """Whether an axis has the source's indices, in order and as they are."""
    return (
        index.grown == index.source_size == index.collapsed_size
        and index.stretch is None
        and bool((index.source == np.arange(index.grown)).all())
        and bool((index.collapsed == index.source).all())
    )


def _collapsed_part(array: Array, axes: Sequence[AxisIndex], scale: float) -> tuple[Array, float]:
    half = array.dtype.itemsize == 2
    total: Array = np.asarray(array, dtype=np.float32 if half else np.float64)
    axes = tuple(map(_copies, axes))
    total = total[tuple(slice(index.grown) for index in axes)]
    for axis, index in enumerate(axes):
        if index.stretch is not None:
            total = np.asarray(total) / index.stretch.reshape(
                [-1 if axis == other else 1 for other in range(total.ndim)]
            )
    for axis, index in enumerate(axes):
        if index.collapsed_size != index.grown:
            times = _turns(index.collapsed, index.collapsed_size)
            if times:
                total = _in_turns(total, axis, times).sum(axis=axis)
            else:
                total = np.moveaxis(_added(np.moveaxis(total, axis, 0), index), 0, axis)
    error = 0.0
    for axis, index in enumerate(axes):
        if index.source_size == index.collapsed_size:
            continue
        of_collapsed = np.empty(index.collapsed_size, dtype=np.int64)
        of_collapsed[index.collapsed] = index.source
        times = _turns(of_collapsed, index.source_size)
        if times:
            turns = np.moveaxis(_in_turns(total, axis, times), axis, 0)
            error = max([error, *(_largest(turn - turns[0]) for turn in turns[1:])])
            total = turns[0]
            continue
        first = np.unique(of_collapsed, return_index=True)[1]
        kept = np.take(total, first, axis=axis)
        error = max(error, _largest(np.take(kept, of_collapsed, axis=axis) - total))
        total = kept
    return _narrow(np.asarray(total / scale), array), error / abs(scale)


def _turns(indices: Indices, size: int) -> int:
    """How often the indices run from 0 to `size`, one turn after the other; 0 where they do anything else."""
    if not size or len(indices) % size:
        return 0
    turns = indices.reshape(-1, size)
    return len(turns) if bool((turns == np.arange(size)).all()) else 0


def _in_turns(array: Array, axis: int, times: int) -> Array:
    """The array with one axis cut into turns: a new axis in front of it."""
    return array.reshape(*array.shape[:axis], times, array.shape[axis] // times, *array.shape[axis + 1 :])


def _copies(index: AxisIndex) -> AxisIndex:
    """The index vectors of the copies alone, which come before all other indices."""
    copies = int((index.source < index.source_size).sum())
    if copies == index.grown:
        return index
    first = index[slice(copies)]
    return replace(first, collapsed_size=int(first.collapsed.max(initial=-1)) + 1)


def _added(array: Array, index: AxisIndex) -> Array:
    """The sums over the repeats of each index of the first axis."""
    counts = np.bincount(index.collapsed, minlength=index.collapsed_size)
    starts = np.cumsum(counts) - counts
    order = np.argsort(index.collapsed, kind="stable")
    total = array[order[starts]].copy()
    for repeat in range(1, int(counts.max(initial=1))):
        indices = np.flatnonzero(counts > repeat)
        total[indices] += array[order[starts[indices] + repeat]]
    return np.asarray(total)


def _narrow(total: Array, like: Array) -> Array:
    """A float64 result in float32, unless the file's array is float64."""
    return total if like.dtype == np.float64 else total.astype(np.float32)


def _wide(array: Array) -> Array:
    """The array in float32, or in float64 if that is its type."""
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def _largest(array: Array) -> float:
    """The largest absolute value."""
    return float(np.abs(array).max(initial=0.0))
