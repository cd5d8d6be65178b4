"""Models in memory grow as files do; requests may be written as people write them; reports have a short form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import hyperclone_onnx
from hyperclone_onnx import BadModel, BadRequest, Expansion, SourceMap, analyse, expand, plan_expansion, validate
from tests.conftest import perceptron


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return perceptron(layers=1)


@pytest.fixture(scope="module")
def by_path(model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> tuple[Expansion, Path]:
    folder = tmp_path_factory.mktemp("by_path")
    onnx.save(model, folder / "small.onnx")
    return expand(folder / "small.onnx", folder / "big.onnx", factor=2, device="cpu"), folder


# -- models -----------------------------------------------------------------------------------------------


def test_a_message_gives_a_message_and_stays_unchanged(model: onnx.ModelProto, by_path: tuple[Expansion, Path]) -> None:
    before = model.SerializeToString()
    report = expand(model, factor=2, device="cpu")
    assert isinstance(report.model, onnx.ModelProto)
    assert report.model.SerializeToString() == onnx.load(by_path[1] / "big.onnx").SerializeToString()
    assert model.SerializeToString() == before
    assert report.plan.source == by_path[0].plan.source
    assert (report.source, report.output, report.files) == ("the model", None, {})
    json.dumps(report.to_json())


def test_a_model_of_onnx_ir_gives_one_with_its_weights_in_memory(
    by_path: tuple[Expansion, Path], tmp_path: Path
) -> None:
    model = perceptron(layers=1)  # `onnx.save` changes it
    onnx.save(model, tmp_path / "small.onnx", save_as_external_data=True, location="data", size_threshold=0)
    source = ir.load(tmp_path / "small.onnx")
    report = expand(source, factor=2, device="cpu")
    assert isinstance(report.model, ir.Model)
    (tmp_path / "data").unlink()
    grown = ir.load(by_path[1] / "big.onnx").graph.initializers
    for name, value in report.model.graph.initializers.items():
        assert value.const_value is not None
        np.testing.assert_array_equal(value.const_value.numpy(), grown[name].const_value.numpy())  # type: ignore[union-attr]


def test_a_path_without_an_output_gives_a_message(by_path: tuple[Expansion, Path]) -> None:
    report = expand(by_path[1] / "small.onnx", factor=2, device="cpu")
    assert report.model.SerializeToString() == onnx.load(by_path[1] / "big.onnx").SerializeToString()
    assert by_path[0].model is None


def test_a_model_in_memory_can_be_written(
    model: onnx.ModelProto, by_path: tuple[Expansion, Path], tmp_path: Path
) -> None:
    report = expand(model, tmp_path / "big.onnx", factor=2, device="cpu")
    assert report.model is None and list(report.files) == ["big.onnx"]
    assert (tmp_path / "big.onnx").read_bytes() == (by_path[1] / "big.onnx").read_bytes()


def test_models_are_analysed_and_validated_in_memory(model: onnx.ModelProto, by_path: tuple[Expansion, Path]) -> None:
    for source in (model, ir.from_proto(model)):
        assert plan_expansion(analyse(source), 2).dumps() == by_path[0].plan.dumps()
    big = onnx.load(by_path[1] / "big.onnx")
    assert validate(model, big, device="cpu").equal
    assert validate(by_path[1] / "small.onnx", ir.from_proto(big), device="cpu").equal
    wrong = onnx.ModelProto()
    wrong.CopyFrom(big)
    head = next(tensor for tensor in wrong.graph.initializer if tensor.name == "head")
    head.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(head) * 1.5, "head"))
    assert not validate(model, wrong, device="cpu").equal


def sparse() -> onnx.ModelProto:
    message = perceptron(layers=1)
    (gain,) = (tensor for tensor in message.graph.initializer if tensor.name == "gain")
    values = onnx.helper.make_tensor("gain", onnx.TensorProto.FLOAT, [12], np.ones(12, np.float32))
    indices = onnx.helper.make_tensor("at", onnx.TensorProto.INT64, [12], np.arange(12))
    message.graph.initializer.remove(gain)
    message.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [12]))
    return message


def test_sparse_tensors_of_the_given_message_stay_sparse() -> None:
    message = sparse()
    assert plan_expansion(analyse(message), 2).tensors
    assert len(message.graph.sparse_initializer) == 1


def broken() -> onnx.ModelProto:
    message = perceptron(layers=1)
    message.graph.node[1].input[0] = "nowhere"
    return message


def in_a_file() -> onnx.ModelProto:
    message = perceptron(layers=1)
    message.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    return message


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (broken, BadModel, "^the model: .*reads 'nowhere', which is not defined"),
        (in_a_file, BadRequest, "lie in a data file.*give the path"),
        (lambda: ir.from_proto(broken()), BadModel, "^the model: .*nowhere"),
        (onnx.ModelProto, BadModel, "^the model has no graph"),
        (lambda: 7, BadRequest, "the model is a int: give a path, an onnx.ModelProto or an onnx_ir.Model"),
        (lambda: b"bytes", BadRequest, "the model is a bytes"),
    ],
)
def test_a_model_that_is_none_is_refused(given: Callable[[], Any], error: type[Exception], text: str) -> None:
    try:
        source = given()
    except ValueError:  # some releases of onnx_ir refuse it by themselves
        return
    with pytest.raises(error, match=text):
        analyse(source)
    with pytest.raises(error, match=text):
        expand(source, factor=2)


# -- requests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"factor": 2.0}, {"factor": 2}),
        ({"factor": np.int64(2)}, {"factor": 2}),
        ({"factor": 2, "strategy": "diagonal"}, {"factor": 2, "strategy": hyperclone_onnx.Strategy("diagonal")}),
        ({"requests": {"ffn": 2.0}}, {"requests": {"ffn": 2}}),
        ({"requests": {"ffn": np.int32(3)}}, {"requests": {"ffn": 3}}),
        ({"sizes": {"ffn": 30.0}}, {"sizes": {"ffn": 30}}),
        ({"sizes": {"ffn": np.int64(30)}}, {"sizes": {"ffn": 30}}),
        (
            {"maps": {"ffn": SourceMap(20, tile=2)}},
            {"maps": {"ffn.0": SourceMap(20, tile=2), "ffn.1": SourceMap(20, tile=2)}},
        ),
        ({"maps": {"ffn": SourceMap(np.int64(20), tile=np.int64(2))}}, {"requests": {"ffn": 2}}),
        (
            {"maps": {"ffn": SourceMap(20, tile=2), "ffn.1": SourceMap(20, tile=3)}},
            {"requests": {"ffn.0": 2, "ffn.1": 3}},
        ),
    ],
)
def test_a_request_means_what_it_says(given: dict[str, Any], meant: dict[str, Any]) -> None:
    analysis = analyse(perceptron(layers=2))
    plan, wanted = plan_expansion(analysis, **given), plan_expansion(analysis, **meant)
    assert (plan.dims, plan.tensors, plan.strategy) == (wanted.dims, wanted.tensors, wanted.strategy)
    json.loads(plan.dumps())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "say how much to grow: factor=2"),
        ({"factor": "2"}, "the factor is '2': give a number"),
        ({"factor": float("nan")}, "the factor is nan"),
        ({"factor": [2]}, r"the factor is \[2\]"),
        ({"factor": 2, "strategy": "diagonl"}, "no strategy 'diagonl'"),
        ({"factor": 2, "strategy": 3}, "the strategy is 3"),
        ({"factor": 2, "strategies": ["diagonal"]}, "strategies is no list of rules"),
        ({"requests": {"ffn": 1.5}}, "the factor of ffn is 1.5: give a whole number"),
        ({"requests": {"ffn": "2"}}, "the factor of ffn is 2: give a whole number"),
        ({"requests": {"ffn": True}}, "the factor of ffn is True"),
        ({"requests": "ffn"}, "requests is 'ffn'"),
        ({"requests": {3: 2}}, "requests has the name 3"),
        ({"sizes": {"ffn": 30.5}}, "the size of ffn is 30.5: give a whole number"),
        ({"sizes": {"ffn": None}}, "the size of ffn is None"),
        ({"maps": {"ffn": 2}}, "the map of ffn is 2: give a SourceMap"),
        ({"maps": {"ffn": SourceMap(21, tile=2)}}, "the map of ffn is for size 21, and ffn.0 has size 20"),
        ({"maps": {"fnn": SourceMap(20, tile=2)}}, "no dimension 'fnn'; did you mean"),
        ({"maps": [SourceMap(20, tile=2)]}, "maps is "),
    ],
)
def test_a_wrong_request_gives_our_error(given: dict[str, Any], text: str) -> None:
    with pytest.raises(BadRequest, match=text):
        plan_expansion(analyse(perceptron(layers=2)), **given)


def test_a_number_in_the_place_of_the_output_is_explained(model: onnx.ModelProto) -> None:
    with pytest.raises(BadRequest, match=r"the output is 2: give a path .* and the factor as factor=2"):
        expand(model, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("numbers", [{"tile": 1.5}, {"size": "4", "tile": 2}, {"index": (0, 1, 2, 3.5)}])
def test_a_map_of_other_numbers_gives_a_value_error(numbers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give a whole number"):
        SourceMap(**{"size": 4, **numbers})


# -- reports ----------------------------------------------------------------------------------------------


def test_reports_are_short(by_path: tuple[Expansion, Path], model: onnx.ModelProto) -> None:
    report = by_path[0]
    assert re.fullmatch(r"<Expansion: .*small.onnx -> .*big.onnx, [\d,]+ -> [\d,]+ parameters, equal>", repr(report))
    for short in (report, report.validation, analyse(model)):
        assert len(repr(short)) < 400
        html = short._repr_html_()  # type: ignore[union-attr]
        assert html.startswith("<div>") and html.count("<tr>") == html.count("</tr>") > 1
    assert "<td>hidden</td><td>12</td><td>24</td>" in report._repr_html_()


def test_names_from_a_model_are_escaped_in_a_notebook(model: onnx.ModelProto) -> None:
    message = onnx.ModelProto()
    message.CopyFrom(model)
    message.graph.output[0].name = message.graph.node[-1].output[0] = "<script>"
    html = expand(message, factor=2, device="cpu").validation._repr_html_()  # type: ignore[union-attr]
    assert "&lt;script&gt;" in html and "<script>" not in html
