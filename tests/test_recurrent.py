"""Recurrent language models grow as a whole: the weights of each gate share their own sums."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hyperclone_onnx import Strategy, analyse, expand

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
VOCABULARY, EMBEDDING, HIDDEN = 29, 6, 5


def recurrent_model(op: str, directions: int, path: Path) -> Path:
    """Embedding, two recurrent layers, a projection onto the vocabulary."""
    rng = np.random.default_rng(0)
    stored: dict[str, np.ndarray] = {}
    nodes = [helper.make_node("Gather", ["table", "ids"], ["batch_first"])]
    nodes.append(helper.make_node("Transpose", ["batch_first"], ["x0"], perm=[1, 0, 2]))
    stored["table"] = rng.normal(size=(VOCABULARY, EMBEDDING))
    stored["joined"] = np.array([0, 0, -1])
    widths = (EMBEDDING, directions * HIDDEN)
    for layer, width in enumerate(widths):
        gates = GATES[op] * HIDDEN
        shapes = {"w": (gates, width), "r": (gates, HIDDEN), "b": (2 * gates,)}
        stored |= {f"{name}{layer}": rng.normal(size=(directions, *shape)) / 2 for name, shape in shapes.items()}
        direction = "bidirectional" if directions == 2 else "forward"
        inputs = [f"{name}{layer}" for name in "xwrb"]
        nodes += [
            helper.make_node(op, inputs, [f"y{layer}"], hidden_size=HIDDEN, direction=direction, name=f"layer{layer}"),
            helper.make_node("Transpose", [f"y{layer}"], [f"t{layer}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"t{layer}", "joined"], [f"x{layer + 1}"]),
        ]
    stored["head"] = rng.normal(size=(directions * HIDDEN, VOCABULARY))
    nodes.append(helper.make_node("MatMul", ["x2", "head"], ["logits"]))
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ("batch", "sequence"))
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("sequence", "batch", VOCABULARY))
    tensors = [
        numpy_helper.from_array(array if array.dtype == np.int64 else array.astype(np.float32), name)
        for name, array in stored.items()
    ]
    graph = helper.make_graph(nodes, "g", [ids], [logits], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("op", GATES)
def test_a_recurrent_model_grows(op: str, directions: int, tmp_path: Path) -> None:
    source = recurrent_model(op, directions, tmp_path / "model.onnx")
    named = [dimension for dimension in analyse(source).named if dimension.dim.growable]
    assert [(dimension.role, dimension.size) for dimension in named] == [
        ("hidden", EMBEDDING),
        ("hidden", HIDDEN),
        ("hidden", HIDDEN),
    ]
    done = expand(source, tmp_path / "big.onnx", 2, strategy=Strategy("noisy-diagonal"), precision="float64")
    assert done.validation is not None and done.validation.double is not None
    grown = {tensor.name: tuple(tensor.dims) for tensor in onnx.load(tmp_path / "big.onnx").graph.initializer}
    assert grown["r1"] == (directions, 2 * GATES[op] * HIDDEN, 2 * HIDDEN)
    assert not done.separated and not any("scale" in name for name in grown)
