"""The advice for further training of a grown model, and the factor by which fan-ins grew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hyperclone_onnx import Plan, analyse, plan_expansion
from hyperclone_onnx.planning.training_recipe import RECIPE, fan_in_growth


@pytest.fixture
def feed_forward(tmp_path: Path) -> Path:
    """ids -> table -> a matrix with a bias -> another matrix."""
    rng = np.random.default_rng(0)
    shapes = {"table": (11, 8), "up": (8, 12), "bias": (12,), "down": (12, 7)}
    tensors = [numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), n) for n, shape in shapes.items()]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "up"], ["h"]),
        helper.make_node("Add", ["h", "bias"], ["b"]),
        helper.make_node("Relu", ["b"], ["r"]),
        helper.make_node("MatMul", ["r", "down"], ["y"]),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 7])
    graph = helper.make_graph(nodes, "g", [ids], [out], tensors)
    path = tmp_path / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def planned(path: Path, factor: int = 1, **requests: int) -> Plan:
    return plan_expansion(analyse(path), factor, requests)


@pytest.mark.parametrize(
    ("factor", "requests", "growth"),
    [
        (2, {}, {"table": 1, "up": 2, "bias": 1, "down": 2}),
        (3, {}, {"table": 1, "up": 3, "bias": 1, "down": 3}),
        (1, {"ffn": 2}, {"table": 1, "up": 1, "bias": 1, "down": 2}),
        (2, {"ffn": 4}, {"table": 1, "up": 2, "bias": 1, "down": 4}),
    ],
)
def test_fan_in_growth(feed_forward: Path, factor: int, requests: dict[str, int], growth: dict[str, int]) -> None:
    plan = planned(feed_forward, factor, **requests)
    assert {name: fan_in_growth(plan, name) for name in growth} == growth


def test_a_tensor_that_does_not_grow_keeps_its_fan_in(feed_forward: Path) -> None:
    assert fan_in_growth(planned(feed_forward, 2), "no such tensor") == 1.0


def test_advice_is_four_lines_that_point_to_the_evidence() -> None:
    lines = RECIPE.lines()
    assert len(lines) == 4
    assert "no warm-up" in lines[0]
    assert "10% warm-up" in replace(RECIPE, warm_up=0.1).lines()[0]
    for evidence, line in ((RECIPE.evidence, lines[1]), (RECIPE.exact_evidence, lines[2])):
        assert (Path(__file__).parents[1] / evidence).is_file() and evidence in line
    assert RECIPE.new_data_evidence in lines[3] and "not measured on grown models" in lines[3]
