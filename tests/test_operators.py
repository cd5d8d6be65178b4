"""Every operator of the installed ONNX and ONNX Runtime has a rule, or is pinned on purpose."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime.capi.onnxruntime_pybind11_state as runtime
import pytest
from onnx import TensorProto, helper

import hyperclone_onnx.rules
from hyperclone_onnx.analysis.walk import infer
from hyperclone_onnx.reading.normalise import normalise
from hyperclone_onnx.rules import registry

assert hyperclone_onnx.rules  # importing it registers the rules


def test_every_standard_operator_is_ruled_or_pinned() -> None:
    known = {*registry.ruled(), *registry.pinned_operators()}
    standard = {(schema.domain, schema.name) for schema in onnx.defs.get_all_schemas()}
    assert not standard - known, "a new operator needs a rule, or a reason to pin it"


def test_every_pinned_operator_exists() -> None:
    every = {(schema.domain, schema.name) for schema in onnx.defs.get_all_schemas()}
    assert {key for key in registry.pinned_operators() if key[0] != "com.microsoft"} <= every


@pytest.mark.parametrize(("domain", "op_type"), list(registry.pinned_operators()))
def test_pinned_operator_keeps_every_axis(domain: str, op_type: str) -> None:
    """All axes at the operator keep their size, for a reason that is no gap in the rules."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (4, 6))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, (4, 6))
    weight = onnx.numpy_helper.from_array(np.ones((6, 6), np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node(op_type, ["h"], ["y"], domain=domain)]
    imports = [helper.make_opsetid(name, 1) for name in {domain} - {""}]
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), *imports])
    dimensions = infer(normalise(ir.from_proto(model)))
    touched = dimensions.axes[dimensions.model.graph.node(1).inputs[0]] or ()
    pins = [atom.pin for term in touched for atom in dimensions.space.atoms(term)]
    assert len(pins) == 2
    assert all(pin is not None and not pin.gap for pin in pins)
    assert not dimensions.without_rule


def test_contrib_operators_are_ruled_or_pinned() -> None:
    domain = "com.microsoft"
    every = {schema.name for schema in runtime.get_all_operator_schema() if schema.domain == domain}
    covered = {name for name in every if registry.relation(domain, name) or registry.pin_reason(domain, name)}
    assert not every - covered, "a new operator needs a rule, or a reason to pin it"
