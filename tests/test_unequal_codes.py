"""Quantised sums over indices that are repeated unequally: the first repeat of each index counts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import build_model, normal

from hyperclone_onnx import Refused, SourceMap, analyse, plan_expansion
from hyperclone_onnx.plan.edits import CountFirst
from hyperclone_onnx.rewriting.rewriting import rewrite

Array = np.ndarray[Any, Any]
HIDDEN, FFN = 12, 18

PRODUCTS = {
    "dynamic": """q, s, z = DynamicQuantizeLinear (r)  i = MatMulInteger (q, down, z, zero)
        j = MatMulInteger (q, side, z, zero)  k = Add (i, j)
        f = Cast <to = 1> (k)  t = Mul (f, s)  y = Mul (t, scale)""",
    "static": """q = QuantizeLinear (r, step, zero)
        i = QLinearMatMul (q, step, zero, down, scale, zero, result, zero)  y = DequantizeLinear (i, result, zero)""",
    "fused": "y = com.microsoft.DynamicQuantizeMatMul (r, down, scale, zero)",
    "codes alone": "c = DequantizeLinear (down, scale, zero)  y = MatMul (r, c)",
}
"""Forms of a product of an activation with quantised weights."""


def model_of(product: str) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = normal(1, {"up": (HIDDEN, FFN)})
    weights |= {name: rng.integers(0, 255, (FFN, 7)).astype(np.uint8) for name in ("down", "side")}
    weights |= {name: np.float32(number) for name, number in (("scale", 0.01), ("step", 0.03), ("result", 0.05))}
    weights |= {"zero": np.uint8(128)}
    text = f"g (float[batch, 12] x) => (float[batch, 7] y) {{ u = MatMul (x, up)  r = Tanh (u)  {product} }}"
    used = text.replace("(", " ").replace(",", " ").replace(")", " ").split()
    model = build_model(text, {name: np.asarray(array) for name, array in weights.items() if name in used})
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return model


def computed(model: ir.Model, x: Array) -> Array:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (result,) = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options).run(None, {"x": x})
    return np.asarray(result)


@pytest.mark.parametrize("source_map", [SourceMap(FFN, cycle=25), SourceMap(FFN, index=(3, *range(FFN), 3, 17))])
@pytest.mark.parametrize("product", PRODUCTS)
def test_the_sum_is_exact(product: str, source_map: SourceMap, tmp_path: Path) -> None:
    onnx.save(model_of(PRODUCTS[product]), tmp_path / "model.onnx")
    analysis = analyse(tmp_path / "model.onnx")
    (name,) = [dimension.name for dimension in analysis.named if dimension.size == FFN]
    plan = plan_expansion(analysis, maps={name: source_map})
    x = np.random.default_rng(2).standard_normal((5, HIDDEN)).astype(np.float32)
    small, big = computed(analysis.model, x), computed(rewrite(analysis.model, plan), x)
    edits = [edit for edit in plan.edits if isinstance(edit, CountFirst)]
    assert len(edits) == (product != "codes alone") and small.std() > 0.1
    np.testing.assert_allclose(big, small, rtol=0, atol=0 if edits else 1e-6 * np.abs(small).max())


def test_codes_that_something_else_reads_are_refused(tmp_path: Path) -> None:
    """Another reader would see zeros in the place of copies."""
    product = PRODUCTS["dynamic"].replace("f = Cast", "o = Cast <to = 1> (q)  v = MatMul (o, more)  f = Cast")
    model = model_of(product.replace("y = Mul (t, scale)", "w = Mul (t, scale)  y = Add (w, v)"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(normal(3, {"more": (FFN, 7)})["more"], "more"))
    onnx.save(model, tmp_path / "model.onnx")
    analysis = analyse(tmp_path / "model.onnx")
    (name,) = [dimension.name for dimension in analysis.named if dimension.size == FFN]
    with pytest.raises(Refused, match=r"MatMulInteger '.*' sums quantised values over an axis whose parts"):
        plan_expansion(analysis, maps={name: SourceMap(FFN, cycle=25)})


def test_integer_sums_are_scaled_behind_their_conversion(tmp_path: Path) -> None:
    """An RMSNorm scales the channels of its stream, which comes from an integer product here."""
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = normal(1, {"gain": (HIDDEN,), "out": (HIDDEN, 7)})
    weights |= {
        "w": rng.integers(0, 255, (5, HIDDEN)).astype(np.uint8),
        "zero": np.uint8(128),
        "scale": np.float32(0.01),
    }
    text = """g (float[batch, 5] x) => (float[batch, 7] y) {
        q, s, z = DynamicQuantizeLinear (x)  i = MatMulInteger (q, w, z, zero)  f = Cast <to = 1> (i)
        t = Mul (f, s)  h = Mul (t, scale)  n = RMSNormalization (h, gain)  y = MatMul (n, out) }"""
    model = build_model(text, {name: np.asarray(array) for name, array in weights.items()}, opset=23)
    onnx.save(model, tmp_path / "model.onnx")
    analysis = analyse(tmp_path / "model.onnx")
    name = next(dimension.name for dimension in analysis.named if dimension.size == HIDDEN)
    plan = plan_expansion(analysis, maps={name: SourceMap(HIDDEN, cycle=18)})
    x = rng.standard_normal((4, 5)).astype(np.float32)
    small, big = computed(analysis.model, x), computed(rewrite(analysis.model, plan), x)
    np.testing.assert_allclose(big, small, rtol=0, atol=1e-5 * np.abs(small).max())
