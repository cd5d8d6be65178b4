"""The parts of the handoff to Hugging Face that need no framework: layouts, matching, and the equations of scales."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import normal

from hyperclone_onnx.errors import BadModel, Refused
from hyperclone_onnx.frameworks.checkpoints.manifest import HUGGING_FACE
from hyperclone_onnx.frameworks.hugging_face import read_trained
from hyperclone_onnx.frameworks.hugging_face.equations import Equation, solve
from hyperclone_onnx.frameworks.hugging_face.layout import Layout, Piece, grown_shape, laid_out, put_back
from hyperclone_onnx.frameworks.hugging_face.matching import match
from hyperclone_onnx.frameworks.hugging_face.sources import Source

Array = np.ndarray[Any, Any]

AXES = {
    "w": [np.tile(np.arange(4), 2), np.tile(np.arange(6), 2)],
    "q": [np.tile(np.arange(4), 2), np.repeat(np.arange(3), 2)],
    "joined": [np.r_[np.tile(np.arange(4), 2), np.tile(np.arange(4, 6), 2)], np.arange(5)],
    "heads": [np.tile(np.arange(2), 2), np.arange(3), np.arange(5)],
}
"""The source index of each index of the axes of grown initializers."""

LAYOUTS = {
    "as it is": Layout((Piece("w", (0, 1)),), (4, 6)),
    "transposed": Layout((Piece("w", (1, 0)),), (6, 4)),
    "with an axis of one": Layout((Piece("w", (1, 0)),), (6, 1, 4)),
    "less one, halved": Layout((Piece("w", (0, 1), None, 0.5, -1.0),), (4, 6)),
    "side by side": Layout((Piece("w", (0, 1)), Piece("q", (0, 1))), (4, 9), 1),
    "the first part": Layout((Piece("joined", (1, 0), (0, 0, 4)),), (5, 4)),
    "the second part": Layout((Piece("joined", (0, 1), (0, 4, 6)),), (2, 5)),
    "axes merged": Layout((Piece("heads", (0, 1, 2)),), (6, 5), 0, (2, 1)),
    "axes moved and merged": Layout((Piece("heads", (2, 0, 1)),), (5, 6), 0, (1, 2)),
}


def sources(name: str, axis: int) -> Array:
    return np.asarray(AXES[name][axis])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_can_be_reversed(name: str) -> None:
    layout = LAYOUTS[name]
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    rng = np.random.default_rng(0)
    stored = {initializer: rng.standard_normal([len(axis) for axis in axes]) for initializer, axes in AXES.items()}
    parameter = laid_out(layout, stored.__getitem__, sources)
    assert parameter.shape == grown_shape(layout, sources)
    for piece in layout.pieces:
        back = np.full_like(stored[piece.initializer], np.nan)
        written = put_back(layout, parameter, piece.initializer, back, sources)
        there = ~np.isnan(back)
        assert written == there.sum() > 0
        np.testing.assert_allclose(back[there], stored[piece.initializer][there], atol=1e-14)
        assert there.all() or piece.window is not None


def test_a_layout_scales_the_named_part() -> None:
    layout = Layout((Piece("w", (0, 1), None, 1.0, -1.0),), (4, 6))
    stored = {"w": np.arange(96.0).reshape(8, 12)}
    plain = laid_out(layout, stored.__getitem__, sources)
    scaled = laid_out(layout.scaled(0.5, 1.0), stored.__getitem__, sources)
    np.testing.assert_allclose(scaled, (plain + 1.0) * 0.5 - 1.0)


SHAPES = {"square": (6, 6), "wide": (6, 10), "long": (16, 5), "vector": (7,), "heads": (2, 3, 4)}


def tensors() -> dict[str, Array]:
    return normal(3, SHAPES)


CHECKPOINTS = {
    "as it is": (lambda w: {"a": w["square"], "b": w["vector"]}, {"a": "square as it is", "b": "vector as it is"}),
    "transposed": (
        lambda w: {"a": w["square"].T, "b": w["wide"].T},
        {"a": "square transposed", "b": "wide transposed"},
    ),
    "plus one": (lambda w: {"a": w["wide"], "b": w["vector"] - 1}, {"a": "wide as it is", "b": "vector plus -1"}),
    "scaled": (
        lambda w: {"a": w["wide"], "b": 4 * w["square"].T},
        {"a": "wide as it is", "b": "square transposed, times 4"},
    ),
    "a part": (
        lambda w: {"a": w["long"][:10], "b": w["long"][10:].T},
        {"a": "long [0:10] of axis 0", "b": "long [10:16] of axis 0, transposed"},
    ),
    "joined": (
        lambda w: {"a": np.concatenate([w["square"], w["wide"]], 1)},
        {"a": "square as it is beside wide as it is"},
    ),
    "merged": (lambda w: {"a": w["heads"].reshape(6, 4).T}, {"a": "heads transposed"}),
    "of one precision": (lambda w: {"a": w["wide"].astype(np.float16).astype(np.float32)}, {}),
    "one element off": (lambda w: {"a": w["wide"] + np.eye(6, 10, dtype=np.float32)[:, ::-1] * 1e-3}, {}),
    "zeros are a part of no other zeros": (lambda w: {"a": np.zeros(3, np.float32)}, {}),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_tensors_are_matched_by_content(name: str) -> None:
    make, expected = CHECKPOINTS[name]
    stored = {
        initializer: Source(array, 1e-7)
        for initializer, array in {**tensors(), "zeros": np.zeros(9, np.float32)}.items()
    }
    checkpoint = make(tensors())
    matching = match(stored, checkpoint, list(stored))
    assert {parameter: layouts[0].described() for parameter, layouts in matching.layouts.items()} == expected
    for parameter, layouts in matching.layouts.items():
        result = laid_out(
            layouts[0], lambda one: stored[one].array, lambda one, axis: np.arange(stored[one].array.shape[axis])
        )
        np.testing.assert_allclose(result, checkpoint[parameter], atol=1e-5)


def test_equal_tensors_go_by_name_and_then_by_order() -> None:
    ones = np.ones(4, np.float32)
    by_name = {f"x.{name}": Source(ones, 0.0) for name in ("b.gain", "a.gain")}
    matching = match(by_name, {"a.gain": ones, "b.gain": ones}, list(by_name))
    assert [matching.layouts[name][0].pieces[0].initializer for name in ("a.gain", "b.gain")] == [
        "x.a.gain",
        "x.b.gain",
    ]
    nameless = {name: Source(ones, 0.0) for name in ("val_9", "val_3")}
    matching = match(nameless, {"a.gain": ones, "b.gain": ones}, ["val_9", "val_3"])
    assert [matching.layouts[name][0].pieces[0].initializer for name in ("a.gain", "b.gain")] == ["val_9", "val_3"]


def test_equations_are_solved_with_few_changes() -> None:
    half = math.log(0.5)
    equations = [
        Equation({"query": 1.0, "key": 1.0}, half, "scores"),
        Equation({"query": 1.0, "query bias": -1.0}, 0.0, "query + bias"),
        Equation({"key": 1.0, "key bias": -1.0}, 0.0, "key + bias"),
        Equation({"value": 1.0, "out": 1.0}, 0.0, "the residual stream"),
    ]
    sizes = {"query": 100, "key": 50, "value": 50, "out": 100, "query bias": 10, "key bias": 5}
    solution = solve(equations, sizes)
    assert {name: x for name, x in solution.items() if x} == {"key": half, "key bias": half}


def test_equations_without_a_solution_name_where() -> None:
    equations = [Equation({"gain": 1.0}, 0.0, "a norm"), Equation({"gain": 1.0}, math.log(2), "mul in the head")]
    with pytest.raises(Refused, match=r"off by 2 at (a norm|mul in the head)"):
        solve(equations, {"gain": 4})


FOLDERS = {
    "no manifest": (None, "no hyperclone_onnx.json: name the folder"),
    "not JSON": ("{", "malformed"),
    "another version": (json.dumps({"version": 7}), "of version 7; this release reads version 1"),
    "a part is missing": (json.dumps({"version": 1, "initializers": {}}), "malformed"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_was_not_handed_over_is_said(name: str, tmp_path: Path) -> None:
    text, message = FOLDERS[name]
    if text is not None:
        (tmp_path / HUGGING_FACE).write_text(text)
    with pytest.raises(BadModel, match=message):
        read_trained(tmp_path)
