"""Is a grown model right? Answered without the package's own validation, by ONNX Runtime and numpy alone."""

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
"""As a part of the largest element: changed graphs may be badly conditioned, a wrong plan is off by much more."""


class Unrun(Exception):
    """The source itself does not run."""


def session(path: os.PathLike[str]) -> ort.InferenceSession:
    """A session on one thread, with the graph as it is."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False
    return ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


def feeds(source: ort.InferenceSession, rng: np.random.Generator, vocabulary: int) -> dict[str, Array]:
    """Inputs of odd lengths for whatever a graph takes."""
    lengths = {"batch": 2, "past": 3, "channels": 3, "height": 32, "width": 32}
    made: dict[str, Array] = {}
    for each in source.get_inputs():
        dtype = TYPES.get(each.type)
        if dtype is None:
            raise Unrun(f"an input of type {each.type}")
        shape = [
            dim
            if isinstance(dim, int)
            else 8
            if "+" in str(dim) or "total" in str(dim)
            else 7
            if "encoder" in str(dim)
            else next((n for word, n in lengths.items() if word in str(dim)), 5)
            for dim in each.shape
        ]
        if np.prod(shape, dtype=float) > 1e7:
            raise Unrun("inputs too large to try")
        if np.issubdtype(dtype, np.floating):
            array = rng.standard_normal(shape) * 0.5
        elif each.name.endswith("mask") or dtype is np.bool_:
            array = np.ones(shape)
        elif "position" in each.name:
            array = np.broadcast_to(np.arange(shape[-1] if shape else 1), shape)
        else:
            array = rng.integers(0, vocabulary, shape)
        made[each.name] = np.asarray(array).astype(dtype)
    return made


def run_source(path: Path, seed: int) -> list[tuple[dict[str, Array], list[Array]]]:
    """Two runs of the source.

    Raises:
        Unrun: it does not load, or runs on nothing.
    """
    try:
        source = session(path)
    except Exception as problem:  # ONNX Runtime's exceptions share no base class
        raise Unrun(str(problem)[:200]) from problem
    ran: list[tuple[dict[str, Array], list[Array]]] = []
    reason = ""
    for vocabulary in (31, 2):
        given = feeds(source, np.random.default_rng([seed, vocabulary]), vocabulary)
        try:
            ran.append((given, [np.asarray(each) for each in source.run(None, given)]))
        except Exception as problem:
            reason = str(problem)[:200]
    if not ran:
        raise Unrun(reason)
    return ran


def tiled(array: Array, shape: Any) -> Array:
    """An array repeated as numpy.tile does along the axes that are longer in `shape`."""
    if len(shape) != array.ndim:
        raise ValueError(f"rank {len(shape)} for {array.ndim}")
    repeats = []
    for own, wide in zip(array.shape, shape, strict=True):
        if not isinstance(wide, int) or wide == own or own == 0:
            repeats.append(1)
        elif wide % own:
            raise ValueError(f"{array.shape} -> {tuple(shape)}")
        else:
            repeats.append(wide // own)
    return np.tile(array, repeats)


def compare(big: Path, ran: list[tuple[dict[str, Array], list[Array]]]) -> str:
    """What differs between the grown model and the runs of its source; empty when nothing does."""
    try:
        grown = session(big)
        shapes: Mapping[str, Any] = {each.name: each.shape for each in grown.get_inputs()}
        names = [each.name for each in grown.get_outputs()]
        for given, wanted in ran:
            fed = {name: tiled(array, shapes[name]) for name, array in given.items() if name in shapes}
            for name, want, made in zip(names, wanted, grown.run(None, fed), strict=True):
                problem = _differs(want, np.asarray(made))
                if problem:
                    return f"output {name}: {problem}"
    except Exception as problem:
        return f"does not run: {str(problem)[:300]}"
    return ""


def sensitivity(path: Path, ran: list[tuple[dict[str, Array], list[Array]]], by: float = 2e-7) -> float:
    """How much the outputs move, as a part of the largest, when every weight moves by a rounding or so."""
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
    for given, wanted in ran:
        for want, made in zip(wanted, other.run(None, given), strict=True):
            if want.dtype.kind == "f" and want.size:
                a, b = want.astype(np.float64), np.asarray(made, np.float64)
                with np.errstate(invalid="ignore"):
                    error = np.nan_to_num(np.abs(a - b), nan=np.inf).max() / (np.nan_to_num(np.abs(a)).max() or 1.0)
                most = max(most, float(error))
            elif not np.array_equal(want, made):
                most = np.inf
    return most


def _differs(want: Array, made: Array) -> str:
    try:
        want = tiled(want, made.shape)
    except ValueError as problem:
        return str(problem)
    if want.dtype.kind not in "f" or want.dtype != made.dtype:
        return "" if np.array_equal(want, made) else "other values, which must be identical"
    a, b = want.astype(np.float64), made.astype(np.float64)
    finite = np.isfinite(a)
    if not (np.array_equal(finite, np.isfinite(b)) and np.array_equal(a[~finite], b[~finite], equal_nan=True)):
        return "infinite, or not a number, elsewhere"
    if not finite.any():
        return ""
    error = float(np.abs(a[finite] - b[finite]).max() / (np.abs(a[finite]).max() or 1.0))
    return f"relative error {error:.1e}" if error > TOLERANCE else ""
