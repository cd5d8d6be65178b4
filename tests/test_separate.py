"""Tensors that an exporter merged from equal ones are split, so that each use is a parameter of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Command, perceptron

from hyperclone_onnx import BadModel, expand, validate
from hyperclone_onnx.analysis.trainable import merged, trainable
from hyperclone_onnx.plan.plans import Plan, TransformStep
from hyperclone_onnx.transforms.source import source_of

GAINS = ["gain", "gain.1", "gain.2"]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose three norms share one gain of ones. Another tensor has the name that the second gain would get."""
    path = tmp_path_factory.mktemp("untrained") / "small.onnx"
    model = perceptron()
    (gain,) = (tensor for tensor in model.graph.initializer if tensor.name == "gain")
    gain.CopyFrom(onnx.numpy_helper.from_array(np.ones(12, np.float32), "gain"))
    onnx.save(model, path)
    return path


def test_a_merged_gain_is_found_and_each_use_becomes_a_parameter(untrained: Path, tmp_path: Path, cli: Command) -> None:
    assert merged(source_of(untrained).model) == ["gain"] and "gain" not in trainable(source_of(untrained).model)
    done = cli("expand", untrained, "--factor", "2", "--separate", "-o", tmp_path / "big.onnx", "--device", "cpu")
    assert done.code == 0, done.stderr
    big = ir.load(tmp_path / "big.onnx")
    plan = Plan.carried_by(big.metadata_props)
    assert plan is not None and plan.transforms == (TransformStep("separate", {"tensors": ["gain"]}),)
    assert set(GAINS) <= set(trainable(source_of(tmp_path / "big.onnx").model))
    readers = [[use.node.outputs[0].name for use in big.graph.initializers[name].uses()] for name in GAINS]
    assert readers == [["n0"], ["n1"], ["last"]]
    assert validate(untrained, tmp_path / "big.onnx", device="cpu").equal


def test_tensors_that_hold_several_values_stay_one(small: Path, tmp_path: Path) -> None:
    assert merged(source_of(small).model) == []
    report = expand(small, factor=2, separate=True, check=False)
    assert report.plan.transforms == () and "gain.1" not in report.plan.tensors


def test_a_name_that_is_taken_is_not_used_again(untrained: Path, tmp_path: Path) -> None:
    model = onnx.load(untrained)
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == "bias.1")
    bias.name = "gain.1"
    for node in model.graph.node:
        node.input[:] = ["gain.1" if name == "bias.1" else name for name in node.input]
    report = expand(model, factor=2, separate=True, device="cpu")
    assert report.validation is not None and report.validation.equal
    assert {"gain", "gain.1", "gain.1_", "gain.2"} <= set(report.plan.tensors)


def test_a_plan_for_another_model_is_refused(small: Path) -> None:
    with pytest.raises(BadModel, match="several tensors of 'nowhere', and this graph has no such tensor"):
        source_of(small, [TransformStep("separate", {"tensors": ["nowhere"]})])
