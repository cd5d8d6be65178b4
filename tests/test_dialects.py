"""Exporters and users write the same model in different ways. All of these ways grow alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from conftest import normal, perceptron
from onnx import helper

from fuzz.oracle import compare, run_source
from hyperclone_onnx import BadModel, HypercloneError, Refused, Strategy, expand
from hyperclone_onnx.analysis.walk import infer
from hyperclone_onnx.reading.normalise import normalise

Spoil = Callable[[onnx.ModelProto], None]


def grow(model: onnx.ModelProto, folder: Path, plain: onnx.ModelProto | None = None) -> set[str]:
    """Grow a model by 2, compare it in ONNX Runtime with its source or with `plain`, and return the roles that grew."""
    small, big = folder / "small.onnx", folder / "big.onnx"
    onnx.save(model, small)
    made = expand(small, big, 2, strategy=Strategy("symmetric"), check=False)
    if plain is not None:  # the same model in a form that ONNX Runtime can read
        small = folder / "plain.onnx"
        onnx.save(plain, small)
    assert compare(big, run_source(small, 0)) == ""
    return {dim.role for dim in made.plan.dims.values()}


# -- imports ----------------------------------------------------------------------------------------------


def spelled_out(model: onnx.ModelProto) -> None:
    """Imports and nodes give the name of the domain that is usually empty."""
    model.opset_import[0].domain = "ai.onnx"
    for node in model.graph.node:
        node.domain = "ai.onnx"


def spelled_out_in_imports(model: onnx.ModelProto) -> None:
    model.opset_import[0].domain = "ai.onnx"


def spelled_both_ways(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("ai.onnx", 20))
    model.graph.node[1].domain = "ai.onnx"


def spelled_out_in_a_function(model: onnx.ModelProto) -> None:
    """A function of the model, whose nodes and imports use the other spelling of the domain."""
    body = [helper.make_node("Relu", ["x"], ["y"], domain="ai.onnx")]
    opsets = [helper.make_opsetid("ai.onnx", 20)]
    model.functions.append(helper.make_function("own", "Rectify", ["x"], ["y"], body, opsets))
    model.opset_import.append(helper.make_opsetid("own", 1))
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type, relu.domain = "Rectify", "own"


def of_another_version_in_a_function(model: onnx.ModelProto) -> None:
    """Relu is the same in both opsets."""
    spelled_out_in_a_function(model)
    model.functions[0].opset_import[0].version = 17


SPELLINGS = [
    spelled_out,
    spelled_out_in_imports,
    spelled_both_ways,
    spelled_out_in_a_function,
    of_another_version_in_a_function,
]


@pytest.mark.parametrize("spell", SPELLINGS)
def test_spellings_of_the_default_domain(tmp_path: Path, spell: Spoil) -> None:
    model = perceptron()
    spell(model)
    assert grow(model, tmp_path, perceptron()) == {"hidden", "ffn"}
    assert [each.domain for each in onnx.load(tmp_path / "big.onnx").opset_import] in ([""], ["", "own"])


def test_a_model_in_memory_is_spelled_alike() -> None:
    model = perceptron()
    spelled_out(model)
    made = normalise(ir.from_proto(model))
    assert dict(made.graph.opset_imports) == {"": 20}
    assert not infer(made).unruled


def test_a_model_without_a_node_of_onnx_needs_no_import(tmp_path: Path) -> None:
    """Growth may insert nodes of ONNX's own domain, which must then be imported."""
    nodes = [
        helper.make_node("FusedMatMul", ["x", "up"], ["u"], domain="com.microsoft"),
        helper.make_node("QuickGelu", ["u"], ["r"], domain="com.microsoft"),
        helper.make_node("FusedMatMul", ["r", "down"], ["y"], domain="com.microsoft"),
    ]
    stored = [onnx.numpy_helper.from_array(a, n) for n, a in normal(1, {"up": (12, 20), "down": (20, 6)}).items()]
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("x", [3, 12]), ("y", [3, 6])))
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], stored), opset_imports=[helper.make_opsetid("com.microsoft", 1)]
    )
    model.ir_version = 10
    assert grow(model, tmp_path) == {"ffn", "width"}


def two_versions(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("ai.onnx", 19))


def no_version(model: onnx.ModelProto) -> None:
    model.opset_import[0].domain = "com.microsoft"


def too_old(model: onnx.ModelProto) -> None:
    spelled_out(model)
    model.opset_import[0].version = 6


def another_operator_in_a_function(model: onnx.ModelProto) -> None:
    """In opset 17, the axes of a reduction are an attribute."""
    body = [helper.make_node("ReduceMean", ["x"], ["y"], axes=[-1])]
    model.functions.append(helper.make_function("own", "F", ["x"], ["y"], body, [helper.make_opsetid("", 17)]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type, relu.domain = "F", "own"


CONTRADICTIONS: list[tuple[Spoil, type[HypercloneError], str]] = [
    (two_versions, BadModel, "two opsets"),
    (no_version, Refused, "does not say of which opset"),
    (too_old, Refused, "opset 6 is too old"),
    (another_operator_in_a_function, Refused, "ReduceMean changed"),
]


@pytest.mark.parametrize(("spoil", "kind", "text"), CONTRADICTIONS)
def test_imports_that_do_not_fit(tmp_path: Path, spoil: Spoil, kind: type[HypercloneError], text: str) -> None:
    model = perceptron()
    spoil(model)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(kind, match=text):
        expand(tmp_path / "model.onnx", tmp_path / "big.onnx", 2, check=False)
