"""Trained weights of a grown checkpoint, as the initializers of its ONNX file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel, BadRequest
from hyperclone_onnx.frameworks.checkpoints import read_weights
from hyperclone_onnx.frameworks.hugging_face.layout import Layout, put_back
from hyperclone_onnx.frameworks.hugging_face.sources import Grown
from hyperclone_onnx.graphs import eps_of
from hyperclone_onnx.plan.plans import Plan

Array = npt.NDArray[Any]

MANIFEST = "hyperclone_onnx.json"
VERSION = 1


def manifest(
    grown: Grown, layouts: Mapping[str, Layout], also: Mapping[str, tuple[str, Layout]], elsewhere: Mapping[str, Array]
) -> dict[str, Any]:
    """What a folder says of itself: how each tensor is made from the file's initializers, and their axes.

    Args:
        grown: the file.
        layouts: the checkpoint's tensors that are made from it.
        also: initializers that no tensor is made from, and how they can be read back from one.
        elsewhere: the checkpoint's tensors that the file has no place for.
    """
    names = {piece.initializer for each in layouts.values() for piece in each.pieces} | set(also)
    plan = grown.plan
    kept = Plan(plan.dims, {n: r for n, r in plan.tensors.items() if n in names}, (), (), (), (), plan.strategy)
    return {
        "version": VERSION,
        "model": grown.path.name,
        "plan": kept.to_json(),
        "initializers": {
            name: {
                "shape": [int(size) for size in grown.tensors[name].shape.numpy()],
                "dtype": grown.tensors[name].dtype.name,
            }
            for name in sorted(names)
        },
        "tensors": {name: each.to_json() for name, each in layouts.items()},
        "also": {name: [tensor, layout.to_json()] for name, (tensor, layout) in also.items()},
        "elsewhere": {name: _moments(array) for name, array in elsewhere.items()},
    }


def _moments(array: Array) -> list[float]:
    """What tells whether a tensor has been trained: its sum, its power, its largest element."""
    wide = array.astype(np.float64)
    return [float(wide.sum()), float((wide**2).sum()), float(np.abs(wide).max(initial=0.0))]


class _Stored:
    """An initializer's shape and type, where its contents do not matter."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.shape = ir.Shape(entry["shape"])
        self.dtype = ir.DataType[entry["dtype"]]


def read_trained(folder: Path) -> dict[str, Callable[[], Array]]:
    """The initializers of the ONNX file that a folder was handed over from, from the folder's current weights.

    Each is read when it is asked for, in the type that the file has it in. A tensor that the checkpoint stores once
    and the file more than once is given for each of them.

    Args:
        folder: a folder that `grow_checkpoint` wrote, or that a trainer saved from it (`save_pretrained`) with its
            `hyperclone_onnx.json` beside the weights.

    Raises:
        BadModel: the folder is not such a one, or its weights cannot be read.
        BadRequest: a tensor was trained that the ONNX file has no place for. Asking for an array raises it too, where
            a tensor has another shape than was handed over, or several that the file has as one were trained apart.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BadModel(f"{folder}: no {MANIFEST}: copy it from the folder that `handoff --to hf` wrote")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("version") != VERSION:
            raise BadModel(f"{path}: of version {data.get('version')!r}; this release reads version {VERSION}")
        stored = {name: _Stored(entry) for name, entry in data["initializers"].items()}
        grown = Grown(folder, Plan.from_json(data["plan"]), stored)  # type: ignore[arg-type]
        layouts = {name: Layout.from_json(each) for name, each in data["tensors"].items()}
        elsewhere = {name: [float(number) for number in each] for name, each in data["elsewhere"].items()}
        also = {name: (each[0], Layout.from_json(each[1])) for name, each in data["also"].items()}
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as problem:
        raise BadModel(f"{path}: malformed ({type(problem).__name__} {problem})") from problem
    weights = read_weights(folder)
    makers: dict[str, list[tuple[str, Layout]]] = {}
    for name, layout in layouts.items():
        for piece in layout.pieces:
            makers.setdefault(piece.initializer, []).append((name, layout))
    for initializer, maker in also.items():
        makers[initializer] = [maker]
    missing = sorted({name for each in makers.values() for name, _ in each} - weights.keys())
    if missing:
        raise BadModel(f"{folder}: its weights lack {missing[0]}, which was handed over")
    for name, before in elsewhere.items():
        if name in weights and not _is_as_before(weights[name](), before):
            raise BadRequest(
                f"{folder}: {name} was trained, and the ONNX file has no place for it: freeze it, or export "
                "it with the model before growing"
            )
    return {
        initializer: lambda i=initializer, m=each: _made(i, m, grown, weights)  # type: ignore[misc]
        for initializer, each in makers.items()
    }


def _is_as_before(array: Array, before: Sequence[float]) -> bool:
    rounding = max(1e-5, eps_of(ir.DataType.from_numpy(array.dtype)))
    total, power, largest = _moments(array)
    scale = before[2] * max(array.size, 1)
    return (
        abs(total - before[0]) <= rounding * scale
        and abs(power - before[1]) <= 2 * rounding * before[1]
        and abs(largest - before[2]) <= rounding * before[2]
    )


def _made(
    initializer: str,
    makers: list[tuple[str, Layout]],
    grown: Grown,
    weights: Mapping[str, Callable[[], Array]],
) -> Array:
    stored = grown.tensors[initializer]
    shape = [int(size) for size in stored.shape.numpy()]
    whole = np.zeros(shape, dtype=_wider(stored.dtype))
    written = 0
    for number, (name, layout) in enumerate(makers):
        array = weights[name]()
        first = np.zeros_like(whole) if number and len(makers) > 1 and written >= whole.size else whole
        try:
            written += put_back(layout, array.astype(whole.dtype), initializer, first, grown.axis)
        except ValueError as problem:
            raise BadRequest(f"{name} has the shape {list(array.shape)}, another than was handed over") from problem
        if first is not whole and not np.array_equal(first, whole):
            raise BadRequest(
                f"{makers[0][0]} and {name} are one tensor ({initializer}) in the ONNX file, and were trained apart: "
                "grow it with --untie"
            )
    return whole.astype(stored.dtype.numpy())


def _wider(dtype: ir.DataType) -> Any:
    return np.float64 if dtype == ir.DataType.DOUBLE else np.float32
