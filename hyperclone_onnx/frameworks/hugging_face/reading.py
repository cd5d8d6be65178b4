"""Read the weights of a grown checkpoint back as the initializers of its ONNX file.

`manifest` is the data that the handoff writes into the checkpoint's folder. `read_trained` uses it to undo each layout
and each factor after training.
"""

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
from hyperclone_onnx.frameworks.checkpoints.manifest import HUGGING_FACE
from hyperclone_onnx.frameworks.continuation import Continuation
from hyperclone_onnx.frameworks.hugging_face.layout import Layout, put_back
from hyperclone_onnx.frameworks.hugging_face.sources import Grown
from hyperclone_onnx.graphs import eps_of
from hyperclone_onnx.plan.plans import Plan

Array = npt.NDArray[Any]

VERSION = 1


def manifest(
    grown: Grown,
    layouts: Mapping[str, Layout],
    also: Mapping[str, tuple[str, Layout]],
    elsewhere: Mapping[str, Array],
    continuations: Mapping[str, Continuation],
) -> dict[str, Any]:
    """The data that a folder needs so that its weights can be read back into the ONNX file.

    It says how each tensor is made from initializers, and holds the part of the plan that gives their axes.

    Args:
        grown: the grown ONNX file.
        layouts: for each tensor that is made from initializers, its layout.
        also: initializers from which no tensor is made, with the tensor and the layout to read them back from.
        elsewhere: the checkpoint's tensors that the ONNX file does not have.
        continuations: how the checkpoint's tensors follow the source's in training.
    """
    names = {piece.initializer for layout in layouts.values() for piece in layout.pieces} | set(also)
    plan = grown.plan
    kept = Plan(
        plan.dims,
        {name: recipe for name, recipe in plan.tensors.items() if name in names},
        (),
        (),
        (),
        (),
        plan.strategy,
        strategies={name: strategy for name, strategy in plan.strategies.items() if name in names},
    )
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
        "tensors": {name: layout.to_json() for name, layout in layouts.items()},
        "also": {name: [tensor, layout.to_json()] for name, (tensor, layout) in also.items()},
        "elsewhere": {name: _moments(array) for name, array in elsewhere.items()},
        "continuations": {name: tensor.to_json() for name, tensor in continuations.items()},
    }


def _moments(array: Array) -> list[float]:
    """Numbers that change when a tensor is trained: its sum, its sum of squares, its largest absolute value."""
    wide = array.astype(np.float64)
    return [float(wide.sum()), float((wide**2).sum()), float(np.abs(wide).max(initial=0.0))]


class _Stored:
    """An initializer's shape and type, for places that need no elements."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.shape = ir.Shape(entry["shape"])
        self.dtype = ir.DataType[entry["dtype"]]


def read_trained(folder: Path, manifest_path: Path | None = None) -> dict[str, Callable[[], Array]]:
    """Read the current weights of a checkpoint's folder as the initializers of its ONNX file.

    Args:
        folder: a folder that `grow_checkpoint` wrote, or a folder that a trainer saved (`save_pretrained`).
        manifest_path: the ``hyperclone_onnx.json`` that `grow_checkpoint` wrote; by default the one in `folder`.

    Returns:
        For each initializer a function that reads its array, in the type that the file has. If the checkpoint stores a
        tensor once and the file stores it several times, each of these initializers is given.

        Such a function raises BadRequest where a tensor has another shape than it had at the handoff, or where
        several tensors that are one initializer in the file now differ.

    Raises:
        BadModel: the folder has no valid manifest, or its weights cannot be read or lack a tensor.
        BadRequest: a tensor was trained that the ONNX file does not have.
    """
    path = manifest_path or folder / HUGGING_FACE
    if not path.is_file():
        raise BadModel(
            f"{path.parent}: no {HUGGING_FACE}: name the folder that `handoff --to hf` wrote with --manifest"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("version") != VERSION:
            raise BadModel(f"{path}: of version {data.get('version')!r}; this release reads version {VERSION}")
        stored = {name: _Stored(entry) for name, entry in data["initializers"].items()}
        grown = Grown(folder, Plan.from_json(data["plan"]), stored)  # type: ignore[arg-type]
        layouts = {name: Layout.from_json(entry) for name, entry in data["tensors"].items()}
        elsewhere = {name: [float(number) for number in moments] for name, moments in data["elsewhere"].items()}
        also = {name: (entry[0], Layout.from_json(entry[1])) for name, entry in data["also"].items()}
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as problem:
        raise BadModel(f"{path}: malformed ({type(problem).__name__} {problem})") from problem
    weights = read_weights(folder)
    makers: dict[str, list[tuple[str, Layout]]] = {}
    for name, layout in layouts.items():
        for piece in layout.pieces:
            makers.setdefault(piece.initializer, []).append((name, layout))
    for initializer, maker in also.items():
        makers[initializer] = [maker]
    missing = sorted({name for pairs in makers.values() for name, _ in pairs} - weights.keys())
    if missing:
        raise BadModel(f"{folder}: its weights lack {missing[0]}, which they had at the handoff")
    for name, before in elsewhere.items():
        if name in weights and not _is_as_before(weights[name](), before):
            raise BadRequest(
                f"{folder}: {name} was trained, and the ONNX file has no place for it: freeze it, or export "
                "it with the model before growing"
            )
    return {
        initializer: lambda i=initializer, m=pairs: _made(i, m, grown, weights)  # type: ignore[misc]
        for initializer, pairs in makers.items()
    }


def _is_as_before(array: Array, before: Sequence[float]) -> bool:
    """Whether a tensor's moments are those that the manifest holds, up to the rounding of the tensor's type."""
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
    """An initializer, put together from the checkpoint's tensors that hold parts of it or copies of it.

    Args:
        initializer: its name.
        makers: the tensors with the layouts that make them from the initializer.
        grown: gives the initializer's shape, type and axes.
        weights: functions that read the checkpoint's tensors, by name.

    Raises:
        BadRequest: a tensor has another shape than at the handoff, or two copies differ.
    """
    stored = grown.tensors[initializer]
    shape = [int(size) for size in stored.shape.numpy()]
    whole = np.zeros(shape, dtype=_wider(stored.dtype))
    written = 0
    for number, (name, layout) in enumerate(makers):
        array = weights[name]()
        # Once all elements are written, every further tensor is a copy: we compare it instead.
        target = np.zeros_like(whole) if number and len(makers) > 1 and written >= whole.size else whole
        try:
            written += put_back(layout, array.astype(whole.dtype), initializer, target, grown.axis)
        except ValueError as problem:
            raise BadRequest(f"{name} has the shape {list(array.shape)}, and had another at the handoff") from problem
        if target is not whole and not np.array_equal(target, whole):
            raise BadRequest(
                f"{makers[0][0]} and {name} are one tensor ({initializer}) in the ONNX file, but their values differ: "
                "grow it with --untie"
            )
    return whole.astype(stored.dtype.numpy())


def _wider(dtype: ir.DataType) -> Any:
    return np.float64 if dtype == ir.DataType.DOUBLE else np.float32
