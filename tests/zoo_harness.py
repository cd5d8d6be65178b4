"""Runs graphs of the zoo on suitable inputs, and compares them with grown ones, without any code of the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from hyperclone_onnx import Expansion

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]
Zoo = Callable[[str], Path]
Expected = Callable[[str], list[tuple[Feeds, list[Array]]]]

TOLERANCE = 1e-5
"""The limit for float32 rounding errors, divided by the largest output. The measured errors are 1e-6 and less."""


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def make_feeds(path: Path) -> Iterator[Feeds]:
    """Feeds for a zoo graph: two lengths; in the second some tokens of a row are padding, and caches hold something."""
    rng = np.random.default_rng(5)
    inputs = onnx.load(path, load_external_data=False).graph.input
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in inputs
    }
    for batch, length, past, padding in ((2, 6, 0, 0), (3, 9, 5, 4)):
        # On the CPU, GroupQueryAttention continues one sequence at a time, and without padding.
        grouped = "total_sequence" in shapes.get("attention_mask", ())
        sizes = {"batch": 1 if grouped and past else batch, "length": length, "past": past}
        yield {
            value.name: values(
                value.name,
                tuple(size_of(dim, value.name, sizes) for dim in shapes[value.name]),
                onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type),
                past,
                0 if grouped else padding,
                rng,
            )
            for value in inputs
        }


def size_of(dim: str | int, name: str, sizes: Mapping[str, int]) -> int:
    """The size of an axis, by its name if it has one."""
    if isinstance(dim, int):
        return dim
    if "+" in dim or "total" in dim:
        return sizes["past"] + sizes["length"]
    named = {"batch": sizes["batch"], "past": sizes["past"], "channels": 3, "height": 32, "width": 32}
    named["encoder_sequence"] = 7
    return next((size for part, size in named.items() if part in dim), sizes["length"])


def values(
    name: str, shape: tuple[int, ...], dtype: np.dtype[Any], past: int, padding: int, rng: np.random.Generator
) -> Array:
    """The values of an input, chosen by its name."""
    if name == "use_cache_branch":
        return np.full(shape, past > 0)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if name.endswith("mask"):
        mask = np.ones(shape, dtype)
        mask[0, mask.shape[1] - padding :] = 0
        return mask
    if name == "position_ids":
        return np.broadcast_to(np.arange(past, past + shape[1], dtype=dtype), shape)
    bound = {"token_type_ids": 2, "cache_position": 8}.get(name, 95)
    return (rng.integers(3, 95, shape) % bound).astype(dtype)


def tiled(array: Array, shape: tuple[int, ...]) -> Array:
    """The array, tiled along the axes that are longer in `shape`."""
    assert len(shape) == array.ndim
    assert all(wide == narrow or wide % narrow == 0 for narrow, wide in zip(array.shape, shape, strict=True))
    return np.tile(array, [wide // max(narrow, 1) or 1 for narrow, wide in zip(array.shape, shape, strict=True)])


def grown_feeds(grown: ort.InferenceSession, feeds: Feeds) -> Feeds:
    """The inputs, tiled to the shapes of the grown graph's inputs."""
    shapes = {value.name: value.shape for value in grown.get_inputs()}
    return {
        name: tiled(
            array,
            tuple(
                wide if isinstance(wide, int) else size for wide, size in zip(shapes[name], array.shape, strict=True)
            ),
        )
        for name, array in feeds.items()
    }


def assert_computes_the_same(path: Path, cases: list[tuple[Feeds, list[Array]]]) -> None:
    grown = session(path)
    for feeds, expected in cases:
        for want, got in zip(expected, grown.run(None, grown_feeds(grown, feeds)), strict=True):
            if want.size == 0:
                # In its later steps, a merged decoder returns empty caches for the encoder.
                assert got.size == 0
                continue
            assert np.isfinite(want).all() and float(want.std()) > 1e-3, "an output that could not show a difference"
            error = float(np.abs(tiled(want, got.shape) - got).max() / np.abs(want).max())
            assert error <= TOLERANCE


def assert_validation_says_so(result: Expansion) -> None:
    validation = result.validation
    assert validation is not None and validation.equal and validation.problems == []
    assert validation.tensors is not None and validation.tensors.checked > 0 and not validation.tensors.wrong
    assert validation.double, "the models were not run in float64"
    assert all(output.max_relative <= 1e-12 for output in validation.double)
    assert any(output.max_relative > 0 for output in validation.outputs), "two runs without any rounding are one run"


def weights(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the floating-point tensors in a file."""
    return {
        tensor.name: tuple(tensor.dims)
        for tensor in onnx.load(path).graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }


def parameters(path: Path) -> int:
    return sum(math.prod(shape) for shape in weights(path).values())
