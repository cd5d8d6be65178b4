"""A model that rounds its activations has a form without this rounding: its sums of integers become sums of reals."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from hyperclone_onnx.validation.unrounded import rounds, unrounded

RNG = np.random.default_rng(0)
WEIGHT = RNG.integers(-127, 128, (8, 6)).astype(np.int8)


@pytest.mark.parametrize("steps", [("Div",), ("Add",), ("Add", "Div"), ("Mul", "Sub", "Div"), ()])
def test_arithmetic_on_integer_sums(steps: tuple[str, ...]) -> None:
    stored = {"w": WEIGHT}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["codes", "w", "zero"], ["sum.0"]),
    ]
    for number, step in enumerate(steps):
        stored[f"n.{number}"] = np.array(3 + number, dtype=np.int32)
        nodes.append(helper.make_node(step, [f"sum.{number}", f"n.{number}"], [f"sum.{number + 1}"], name=f"s{number}"))
    nodes.append(helper.make_node("Cast", [f"sum.{len(steps)}"], ["real"], to=TensorProto.FLOAT))
    nodes.append(helper.make_node("Mul", ["real", "scale"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    assert rounds(model)
    session = ort.InferenceSession(ir.to_proto(unrounded(model)).SerializeToString())
    x = RNG.normal(size=(5, 8)).astype(np.float32)
    expected = x.astype(np.float64) @ WEIGHT
    for number, step in enumerate(steps):
        expected = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}[step](expected, 3 + number)
    np.testing.assert_allclose(session.run(["y"], {"x": x})[0], expected, rtol=1e-4, atol=1e-4)
