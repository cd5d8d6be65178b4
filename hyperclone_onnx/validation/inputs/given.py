"""Reads the user's own inputs: an .npz file, a folder of .npy files, or the test data of an ONNX model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from hyperclone_onnx.algebra.evaluation import variables
from hyperclone_onnx.errors import BadRequest, first_line
from hyperclone_onnx.plan.maps import presented
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.reading.defaults import defaults_of
from hyperclone_onnx.rules.op import declared_shape
from hyperclone_onnx.validation.inputs.cases import Array, Case, Feeds
from hyperclone_onnx.validation.inputs.search import Wishes

KINDS = "an .npz file, a folder of .npy files, or a folder of ONNX's test_data_set_*/input_*.pb"


Inputs = str | os.PathLike[str] | Mapping[str, Array] | Sequence[Mapping[str, Array]]
"""The accepted forms: a path, or one or several mappings from input names to arrays."""


def wishes_of(
    model: ir.Model,
    inputs: Inputs | None = None,
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
    plan: Plan | None = None,
) -> Wishes:
    """Read and check the user's wishes for the inputs of a model.

    Args:
        model: the model that gets the inputs.
        inputs: a path (see `read_inputs`), or arrays by input name.
        dims: numbers for named sizes.
        seed: the seed for all other numbers.
        plan: the plan by which the model was grown. With it, inputs of the source are accepted too, and grown.

    Raises:
        BadRequest: the inputs do not fit, or no input has a size of that name.
    """
    names = sorted({name for value in model.graph.inputs for name in _names_of_sizes(value)})
    for name, number in (dims or {}).items():
        if name not in names:
            known = f"its inputs have {', '.join(names)}" if names else "the sizes of its inputs have no names"
            raise BadRequest(f"--dim {name}={number}: the model has no size of that name; {known}")
        if number < 0:
            raise BadRequest(f"--dim {name}={number}: a size is a whole number from 0 on")
    return Wishes(() if inputs is None else read_inputs(inputs, model, plan), dict(dims or {}), seed)


def _names_of_sizes(value: ir.Value) -> Iterator[str]:
    for size in declared_shape(value) or ():
        if size is not None:
            yield from variables(size)
            yield from size.symbols


def read_inputs(inputs: Inputs, model: ir.Model, plan: Plan | None = None) -> tuple[Case, ...]:
    """The user's input sets, in the types of the model.

    Args:
        inputs: arrays by input name; an .npz file with such arrays; a folder of .npy files named like the inputs; or a
            folder with ONNX's test data: `input_0.pb` and so on, or several folders `test_data_set_*` with these.
        model: the model that gets the inputs.
        plan: the plan by which the model was grown. With it, inputs of the source are accepted too, and grown.

    Raises:
        BadRequest: the inputs cannot be read, one is missing, or one does not fit.
    """
    if isinstance(inputs, Mapping):
        sets = [("the inputs given", dict(inputs))]
    elif isinstance(inputs, str | os.PathLike):
        sets = [(str(file), arrays) for file, arrays in _read(Path(inputs), model)]
    else:
        sets = [(f"input set {number} given", dict(arrays)) for number, arrays in enumerate(inputs)]
    return tuple(Case(label, _fitted(label, _grown(arrays, plan, model), model)) for label, arrays in sets)


def _read(place: Path, model: ir.Model) -> list[tuple[Path, Feeds]]:
    try:
        if place.is_dir():
            sets = sorted(place.glob("test_data_set_*"), key=_number)
            if sets:
                return [(folder, _read_protobufs(folder, model)) for folder in sets]
            if any(place.glob("input_*.pb")):
                return [(place, _read_protobufs(place, model))]
            arrays = {file.stem: np.load(file, allow_pickle=False) for file in sorted(place.glob("*.npy"))}
            if arrays:
                return [(place, arrays)]
        elif place.is_file() and place.suffix == ".npy":
            return [(place, {_inputs(model)[0].name or "": np.load(place, allow_pickle=False)})]
        elif place.is_file():
            with np.load(place, allow_pickle=False) as stored:
                return [(place, {name: stored[name] for name in stored.files})]
    except (OSError, ValueError, EOFError, AttributeError, IndexError) as problem:
        reason = f"{type(problem).__name__}: {first_line(problem)}"
        what = "cannot be read" if place.is_dir() else "not a readable .npz file"
        raise BadRequest(f"--inputs {place}: {what} ({reason}); it takes {KINDS}") from problem
    raise BadRequest(f"--inputs {place}: {'holds no inputs' if place.exists() else 'does not exist'}; it takes {KINDS}")


def _read_protobufs(folder: Path, model: ir.Model) -> Feeds:
    """The tensors in `input_0.pb` and so on, by their names, or by their numbers if they have no name of an input."""
    names = [value.name or "" for value in _inputs(model)]
    arrays: Feeds = {}
    for file in sorted(folder.glob("input_*.pb"), key=_number):
        tensor = onnx.TensorProto()
        try:
            tensor.ParseFromString(file.read_bytes())
            array = numpy_helper.to_array(tensor)
        except Exception as problem:  # protobuf's errors share no base class
            raise BadRequest(f"--inputs {file}: holds no tensor ({first_line(problem)})") from problem
        number = _number(file)
        if tensor.name not in names and number >= len(names):
            raise BadRequest(f"--inputs {file}: the model has {len(names)} inputs")
        arrays[tensor.name if tensor.name in names else names[number]] = array
    return arrays


def _number(path: Path) -> int:
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else 0


def _inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs that have no default."""
    defaults = {value for value, _ in defaults_of(model)}
    return [value for value in model.graph.inputs if value.const_value is None and value not in defaults]


def _fitted(place: str, arrays: Mapping[str, Array], model: ir.Model) -> Feeds:
    """The arrays in the types of the model.

    Raises:
        BadRequest: an array is missing, or has another shape or other elements than the model accepts.
    """
    values = {value.name or "": value for value in model.graph.inputs}
    missing = [value.name or "" for value in _inputs(model) if value.name not in arrays]
    if missing:
        raise BadRequest(
            f"--inputs {place}: it lacks {', '.join(map(repr, missing))}; the model's inputs are "
            f"{', '.join(map(repr, values))}"
        )
    return {name: _as_input(place, arrays[name], value) for name, value in values.items() if name in arrays}


def _as_input(place: str, array: Array, value: ir.Value) -> Array:
    dtype = value.dtype
    if value.shape is not None:
        declared = value.shape.dims
        fits = len(declared) == array.ndim and all(
            not isinstance(size, int) or size < 0 or size == length
            for size, length in zip(declared, array.shape, strict=False)
        )
        if not fits:
            text = ", ".join(str(size) if isinstance(size, int) else size.value or "?" for size in declared)
            raise BadRequest(f"--inputs {place}: {value.name!r} has the shape {array.shape}, the model takes ({text})")
    if dtype is None or dtype == ir.DataType.STRING:
        return array
    whole = array.dtype.kind in "iub"
    if not whole and (dtype.is_integer() or dtype == ir.DataType.BOOL):
        raise BadRequest(f"--inputs {place}: {value.name!r} holds {array.dtype}, the model takes {dtype.name.lower()}")
    return array.astype(dtype.numpy())


def _grown(arrays: Feeds, plan: Plan | None, model: ir.Model) -> Feeds:
    """Grow inputs that have the sizes of the source. Inputs that have the grown sizes stay as they are."""
    result = dict(arrays)
    for interface in () if plan is None or plan.keep_interface else plan.inputs:
        array = result.get(interface.name)
        for axis, factors in enumerate(interface.axes):
            if array is None or factors is None or axis >= array.ndim:
                continue
            source = presented(factors, plan.maps) if plan is not None else None
            if source is None or array.shape[axis] != int(source.max()) + 1 or array.shape[axis] == len(source):
                continue
            array = result[interface.name] = np.take(array, source, axis=axis)
    return result
