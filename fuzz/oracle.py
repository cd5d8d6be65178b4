"""Checks whether a grown model is right, with ONNX Runtime and numpy only, not with the package's validation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

Array = np.ndarray[Any, Any]
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
}
TOLERANCE = 1e-3
"""The allowed difference, divided by the largest element.

It is large because changed graphs may be badly conditioned. A wrong plan makes a much larger difference.
"""


class Unrun(Exception):
    """The source does not run, so that there is nothing to compare."""


def session(path: os.PathLike[str]) -> ort.InferenceSession:
    """A session with one thread, and without optimisations of the graph."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False
    return ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


def feeds(source: ort.InferenceSession, rng: np.random.Generator, vocabulary: int) -> dict[str, Array]:
    """Random values for all inputs of a graph, of odd lengths.

    Raises:
        Unrun: an input has an unknown type, or is too large.
    """
    lengths = {"batch": 2, "past": 3, "channels": 3, "height": 32, "width": 32}
    arrays: dict[str, Array] = {}
    for value in source.get_inputs():
        dtype = TYPES.get(value.type)
        if dtype is None:
            raise Unrun(f"an input of type {value.type}")
        shape = [
            dim
            if isinstance(dim, int)
            else 8
            if "+" in str(dim) or "total" in str(dim)
            else 7
            if "encoder" in str(dim)
            else next((n for word, n in lengths.items() if word in str(dim)), 5)
            for dim in value.shape
        ]
        if np.prod(shape, dtype=float) > 1e7:
            raise Unrun("inputs too large to try")
        if np.issubdtype(dtype, np.floating):
            array = rng.standard_normal(shape) * 0.5
        elif value.name.endswith("mask") or dtype is np.bool_:
            array = np.ones(shape)
        elif "position" in value.name:
            array = np.broadcast_to(np.arange(shape[-1] if shape else 1), shape)
        else:
            array = rng.integers(0, vocabulary, shape)
        arrays[value.name] = np.asarray(array).astype(dtype)
    return arrays


def run_source(path: Path, seed: int) -> list[tuple[dict[str, Array], list[Array]]]:
    """Run the source on up to two sets of inputs.

    Returns:
        (inputs by name, outputs) of each run that succeeds.

    Raises:
        Unrun: the source cannot be loaded, or no run succeeds.
    """
    try:
        source = session(path)
    except Exception as problem:  # ONNX Runtime's exceptions share no base class
        raise Unrun(str(problem)[:200]) from problem
    ran: list[tuple[dict[str, Array], list[Array]]] = []
    reason = ""
    for vocabulary in (31, 2):
        inputs = feeds(source, np.random.default_rng([seed, vocabulary]), vocabulary)
        try:
            ran.append((inputs, [np.asarray(output) for output in source.run(None, inputs)]))
        except Exception as problem:
            reason = str(problem)[:200]
    if not ran:
        raise Unrun(reason)
    return ran


def tiled(array: Array, shape: Any) -> Array:
    """The array, tiled along the axes that are longer in `shape`.

    Raises:
        ValueError: the ranks differ, or a size is no multiple of the array's.
    """
    if len(shape) != array.ndim:
        raise ValueError(f"rank {len(shape)} for {array.ndim}")
    repeats = []
    for size, grown in zip(array.shape, shape, strict=True):
        if not isinstance(grown, int) or grown == size or size == 0:
            repeats.append(1)
        elif grown % size:
            raise ValueError(f"{array.shape} -> {tuple(shape)}")
        else:
            repeats.append(grown // size)
    return np.tile(array, repeats)


def compare(big: Path, ran: list[tuple[dict[str, Array], list[Array]]]) -> str:
    """A text that says how the grown model differs from the runs of its source; empty if it does not differ."""
    try:
        grown = session(big)
        shapes: Mapping[str, Any] = {value.name: value.shape for value in grown.get_inputs()}
        names = [value.name for value in grown.get_outputs()]
        for inputs, expected_outputs in ran:
            fed = {name: tiled(array, shapes[name]) for name, array in inputs.items() if name in shapes}
            for name, expected, actual in zip(names, expected_outputs, grown.run(None, fed), strict=True):
                problem = _differs(expected, np.asarray(actual))
                if problem:
                    return f"output {name}: {problem}"
    except Exception as problem:
        return f"does not run: {str(problem)[:300]}"
    return ""


def sensitivity(path: Path, ran: list[tuple[dict[str, Array], list[Array]]], by: float = 2e-7) -> float:
    """The change of the outputs, divided by the largest output, if every weight changes by about a rounding error."""
    rng = np.random.default_rng(0)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = onnx.numpy_helper.to_array(tensor)
            moved = array * (1.0 + by * rng.standard_normal(array.shape)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(moved, np.float32), tensor.name))
    moved_path = path.with_name("moved.onnx")
    moved_path.write_bytes(model.SerializeToString())
    most = 0.0
    other = session(moved_path)
    for inputs, expected_outputs in ran:
        for expected, actual in zip(expected_outputs, other.run(None, inputs), strict=True):
            if expected.dtype.kind == "f" and expected.size:
                a, b = expected.astype(np.float64), np.asarray(actual, np.float64)
                with np.errstate(invalid="ignore"):
                    error = np.nan_to_num(np.abs(a - b), nan=np.inf).max() / (np.nan_to_num(np.abs(a)).max() or 1.0)
                most = max(most, float(error))
            elif not np.array_equal(expected, actual):
                most = np.inf
    return most


def _differs(expected: Array, actual: Array) -> str:
    """How an output differs from the expected one, tiled to its shape; empty if it does not differ."""
    try:
        expected = tiled(expected, actual.shape)
    except ValueError as problem:
        return str(problem)
    if expected.dtype.kind not in "f" or expected.dtype != actual.dtype:
        return "" if np.array_equal(expected, actual) else "other values, which must be identical"
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(a)
    if not (np.array_equal(finite, np.isfinite(b)) and np.array_equal(a[~finite], b[~finite], equal_nan=True)):
        return "infinite, or not a number, elsewhere"
    if not finite.any():
        return ""
    error = float(np.abs(a[finite] - b[finite]).max() / (np.abs(a[finite]).max() or 1.0))
    return f"relative error {error:.1e}" if error > TOLERANCE else ""
